"""What autograd keeps between a forward and a backward pass."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def kept_by_autograd(model: nn.Module, forward: Callable[[], object]) -> int:
    """Bytes that `forward()` leaves for the backward pass, each storage once, the parameters of the model not counted."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage().data_ptr()
        if storage not in own:
            kept[storage] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forward()
    del result
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
