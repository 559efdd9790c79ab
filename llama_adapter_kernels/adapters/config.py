"""What an adapter looks like: the numbers and choices that a saved adapter carries with it."""

from dataclasses import dataclass

from llama_adapter_kernels.adapters.v2 import Tuning

_CHOICES = {"gate": ("tanh", "identity"), "gate_shape": ("head", "scalar"), "prefix_rows": ("own", "legacy")}
_LARGEST = 1 << 16  # more prompts or layers than any model has: a mistaken number must not ask for terabytes


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
        ValueError: a field is of another type or out of range.
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
            raise ValueError(f"tuning: expected a Tuning or none, got {_shown(self.tuning)}")
        if not is_count(self.prefix_length, at_least=0 if self.tuning is not None else 1):
            expected = f"a whole number from 1 to {_LARGEST}, or 0 with tuning"
            raise ValueError(f"prefix_length: expected {expected}, got {_shown(self.prefix_length)}")
        if self.num_layers is not None and not is_count(self.num_layers):
            raise ValueError(f"num_layers: expected a whole number from 1 or none, got {_shown(self.num_layers)}")
        if self.layers is not None:
            if not isinstance(self.layers, tuple | list | range) or not all(is_count(n, 0) for n in self.layers):
                raise ValueError(f"layers: expected numbers of layers from 0, got {_shown(self.layers)}")
            if not self.layers or len(set(self.layers)) != len(self.layers):
                raise ValueError(f"layers: expected different numbers of layers from 0, got {_shown(self.layers)}")
            object.__setattr__(self, "layers", tuple(self.layers))
        if self.num_layers is not None and self.layers is not None:
            raise ValueError("num_layers, layers: expected one of them, got both")
        for name, values in _CHOICES.items():
            value = getattr(self, name)
            if not isinstance(value, str) or value not in values:
                raise ValueError(f"{name}: expected {' or '.join(values)}, got {_shown(value)}")

    def layer_numbers(self, total: int) -> tuple[int, ...]:
        """The adapted layers of a model with `total` layers, in order.

        Raises:
            ValueError: the model has fewer layers than asked for.
        """
        if self.prefix_length == 0:
            return ()
        if self.layers is not None:
            if max(self.layers) >= total:
                raise ValueError(f"layers: expected numbers from 0 to {total - 1}, got {_shown(self.layers)}")
            return tuple(sorted(self.layers))
        count = total if self.num_layers is None else self.num_layers
        if count > total:
            raise ValueError(f"num_layers: expected 1 to {total} (the layers of the model), got {count}")
        return tuple(range(total - count, total))


def _shown(value: object) -> str:
    """`value` for a message, short whatever it is: a configuration may come from a file that nobody has checked yet."""
    if isinstance(value, int) and abs(value) >= 10**30:  # Python refuses to print integers of thousands of digits
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
