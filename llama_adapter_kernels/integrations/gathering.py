"""Whole parameters, wherever a training or offloading library keeps the pieces of them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def gathered(module: nn.Module, name: str) -> Tensor:
    """The whole of a module's own parameter `name`, without gradient.

    FSDP2 keeps DTensors, DeepSpeed's ZeRO-3 partitions, accelerate a map of weights beside a parameter on the meta device.
    """
    parameter: Any = getattr(module, name)
    if hasattr(parameter, "full_tensor"):
        return _plain(parameter.detach().full_tensor())
    if hasattr(parameter, "ds_id"):
        from deepspeed import zero

        with zero.GatheredParameters([parameter]):
            return _plain(parameter.detach().clone())
    if parameter.is_meta:
        weights = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
        if weights is None:
            raise ValueError(f"{name}: expected a parameter with values, got one on the meta device")
        return _plain(weights[name].detach())
    return _plain(parameter.detach())


def is_writer() -> bool:
    """Whether this process writes files: rank 0 of a process group, or a process without one."""
    distributed: Any = torch.distributed
    ready: Callable[[], bool] = distributed.is_initialized
    return not (distributed.is_available() and ready()) or distributed.get_rank() == 0


def _plain(tensor: Tensor) -> Tensor:
    wait = getattr(tensor, "wait", None)  # an AsyncCollectiveTensor
    return wait() if wait is not None else tensor
