"""Parameters that stay float32 in a model of any precision."""

from collections.abc import Callable
from typing import Self

from torch import Tensor, bfloat16, float16, nn


class KeepsFloat32(nn.Module):
    """A module that moves with its model but stays float32, as small gradients on top of N(0, 1) need."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.dtype in (float16, bfloat16) else moved

        super()._apply(move, recurse)
        return self
