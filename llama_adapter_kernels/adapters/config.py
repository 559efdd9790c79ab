"""What an adapter looks like: the numbers and choices that a saved adapter carries with it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class AdapterConfig:
    """What an adapter looks like.

    Args:
        prefix_length: P, learned prompt tokens per layer.
        num_layers: adapt the last `num_layers` layers; None: all of them.
        layers: or exactly these (numbers from 0). Not together with num_layers.
        gate: "tanh" (the paper: tanh(g) multiplies) or "identity" (g itself, as PEFT does).
        gate_shape: "head" (one gate per query head) or "scalar" (one per layer).

    Raises:
        ValueError: a field is out of range.
    """

    prefix_length: int = 10
    num_layers: int | None = None
    layers: tuple[int, ...] | None = None
    gate: str = "tanh"
    gate_shape: str = "head"

    def __post_init__(self) -> None:
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(self.layers))
        if self.prefix_length < 1:
            raise ValueError(f"prefix_length: expected at least 1, got {self.prefix_length}")
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
        if self.layers is not None:
            wrong = [layer for layer in self.layers if not 0 <= layer < total]
            if wrong or not self.layers or len(set(self.layers)) != len(self.layers):
                raise ValueError(f"layers: expected different numbers from 0 to {total - 1}, got {list(self.layers)}")
            return tuple(sorted(self.layers))
        count = total if self.num_layers is None else self.num_layers
        if not 1 <= count <= total:
            raise ValueError(f"num_layers: expected 1 to {total} (the layers of the model), got {count}")
        return tuple(range(total - count, total))
