"""Prefix keys and values of one layer, computed once for inference and again after any change of what they come from."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

Prefix = tuple[Tensor, Tensor, Tensor]  # prefix_key, prefix_value [1, Hkv, P, D], gate [1, Hq] float32


class PrefixCache:
    """Keeps one prefix together with the tensors it was computed from.

    A source has changed when it is another object, its in-place version moved, or its memory is elsewhere. PyTorch does
    not count writes through `tensor.data`; so whoever owns this also calls `clear` wherever such writes are likely.
    """

    def __init__(self) -> None:
        self._sources: tuple[Tensor, ...] = ()  # held, so that no new object can get the id of an old one
        self._state: tuple[Any, ...] = ()
        self._prefix: Prefix | None = None

    def __reduce__(self) -> tuple[type["PrefixCache"], tuple[()]]:
        return PrefixCache, ()  # copies and pickles of a model start empty

    def get(self, sources: tuple[Tensor, ...], settings: Any) -> Prefix | None:
        """The kept prefix if it was computed from exactly these sources, in their present state, under these settings."""
        if self._prefix is None or self._state != _state(sources, settings):
            return None
        return self._prefix

    def keep(self, sources: tuple[Tensor, ...], settings: Any, prefix: Prefix) -> None:
        if any(tensor.is_inference() or is_traceable_wrapper_subclass(tensor) for tensor in sources):
            return  # these have no version, or no memory of their own, to watch
        self._sources, self._state, self._prefix = sources, _state(sources, settings), prefix

    def clear(self) -> None:
        self._sources, self._state, self._prefix = (), (), None


def _state(sources: tuple[Tensor, ...], settings: Any) -> tuple[Any, ...]:
    return (settings, *[(id(tensor), tensor._version, tensor.data_ptr()) for tensor in sources])


def projection_sources(module: nn.Module, names: tuple[str, ...]) -> list[Tensor] | None:
    """Every tensor that the results of these projections of `module` depend on; None where more than tensors decides.

    A projection made of modules may have switches (LoRA's active adapters), hooks and exchanged forwards may do anything.
    Called for every layer and token: it looks into the dictionaries of nn.Module, whose attribute access is slow.
    """
    tensors: list[Tensor | None] = []
    for name in names:
        projection = module._modules.get(name)
        if projection is None:
            if name in module.__dict__:  # some other callable
                return None
            continue
        if projection._modules or projection._forward_hooks or projection._forward_pre_hooks:
            return None
        if (
            "forward" in projection.__dict__ and "_hf_hook" not in projection.__dict__
        ):  # accelerate's only moves weights
            return None
        tensors += projection._parameters.values()
        tensors += projection._buffers.values()
    return [tensor for tensor in tensors if tensor is not None]


def inference_settings(query: Tensor) -> tuple[torch.dtype, torch.dtype | None]:
    """What else decides about the dtype of a prefix: the query's dtype and autocast's."""
    device_type = query.device.type
    return query.dtype, torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
