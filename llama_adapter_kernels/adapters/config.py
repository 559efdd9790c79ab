"""What an adapter looks like: the numbers and choices that a saved adapter carries with it."""

from dataclasses import dataclass

from llama_adapter_kernels.adapters.v2 import Tuning

_CHOICES = {"gate": ("tanh", "identity"), "gate_shape": ("head", "scalar"), "prefix_rows": ("own", "legacy")}
_LARGEST = 1 << 24  # more prompts or layers than any model has: a number beyond it is no number of them


def is_count(value: object, at_least: int = 1) -> bool:
    """`value` is a whole number (no bool, no float) that counts something."""
    return type(value) is int and at_least <= value <= _LARGEST


@dataclass(frozen=True)
class AdapterConfig:
    """What an adapter looks like.

    Args:
        prefix_length: P, learned prompt tokens per layer; 0: no prompts, the adapter is its tuning alone.
        num_layers: adapt the last `num_layers` layers; None: all of them.
        layers: or exactly these (numbers from 0). Not together with num_layers.
        gate: "tanh" (the paper: tanh(g) multiplies) or "identity" (g itself, as PEFT does).
        gate_shape: "head" (one gate per query head) or "scalar" (one per layer).
        tuning: what LLaMA-Adapter V2 changes in the model besides; None: nothing.
        prefix_rows: "own" (keys and values of a prompt come from the key and value projections) or "legacy" (from rows of
            query, key and value projections stacked, where older releases of LitGPT had keys and values; its releases
            from 0.5.5 train adapters like that).

    Raises:
        ValueError: a field is out of range.
    """

    prefix_length: int = 10
    num_layers: int | None = None
    layers: tuple[int, ...] | None = None
    gate: str = "tanh"
    gate_shape: str = "head"
    tuning: Tuning | None = None
    prefix_rows: str = "own"

    def __post_init__(self) -> None:
        if isinstance(self.tuning, dict):  # as a saved configuration has it
            object.__setattr__(self, "tuning", Tuning(**self.tuning))
        if self.tuning is not None and not isinstance(self.tuning, Tuning):
            raise ValueError(f"tuning: expected a Tuning or none, got {self.tuning!r}")
        if not is_count(self.prefix_length, at_least=0 if self.tuning is not None else 1):
            expected = "a whole number from 1, or 0 with tuning"
            raise ValueError(f"prefix_length: expected {expected}, got {self.prefix_length!r}")
        if self.num_layers is not None and not is_count(self.num_layers):
            raise ValueError(f"num_layers: expected a whole number from 1 or none, got {self.num_layers!r}")
        if self.layers is not None:
            if not isinstance(self.layers, tuple | list | range) or not all(is_count(n, 0) for n in self.layers):
                raise ValueError(f"layers: expected numbers of layers from 0, got {self.layers!r}")
            object.__setattr__(self, "layers", tuple(self.layers))
        if self.num_layers is not None and self.layers is not None:
            raise ValueError("num_layers, layers: expected one of them, got both")
        for name, values in _CHOICES.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name}: expected {' or '.join(values)}, got {getattr(self, name)!r}")

    def layer_numbers(self, total: int) -> tuple[int, ...]:
        """The adapted layers of a model with `total` layers, in order.

        Raises:
            ValueError: the model has fewer layers than asked for.
        """
        if self.prefix_length == 0:
            return ()
        if self.layers is not None:
            wrong = [layer for layer in self.layers if not 0 <= layer < total]
            if wrong or not self.layers or len(set(self.layers)) != len(self.layers):
                raise ValueError(f"layers: expected different numbers from 0 to {total - 1}, got {list(self.layers)}")
            return tuple(sorted(self.layers))
        count = total if self.num_layers is None else self.num_layers
        if not 1 <= count <= total:
            raise ValueError(f"num_layers: expected 1 to {total} (the layers of the model), got {count}")
        return tuple(range(total - count, total))
