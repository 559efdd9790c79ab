"""What an adapter looks like: the numbers and choices that a saved adapter carries with it."""

from dataclasses import dataclass

from llama_adapter_kernels.adapters.v2 import Tuning


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
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(self.layers))
        if isinstance(self.tuning, dict):  # as a saved configuration has it
            object.__setattr__(self, "tuning", Tuning(**self.tuning))
        if self.prefix_length < (0 if self.tuning is not None else 1):
            raise ValueError(f"prefix_length: expected at least 1 (0 with tuning), got {self.prefix_length}")
        if self.prefix_rows not in ("own", "legacy"):
            raise ValueError(f"prefix_rows: expected own or legacy, got {self.prefix_rows!r}")
        if self.num_layers is not None and self.layers is not None:
            raise ValueError("num_layers, layers: expected one of them, got both")
        if self.gate not in ("tanh", "identity"):
            raise ValueError(f"gate: expected tanh or identity, got {self.gate!r}")
        if self.gate_shape not in ("head", "scalar"):
            raise ValueError(f"gate_shape: expected head or scalar, got {self.gate_shape!r}")

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
