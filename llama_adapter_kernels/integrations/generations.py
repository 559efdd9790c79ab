"""Prefixes that live as long as one generation: computed in its first pass, dropped with its cache of keys and values."""

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from llama_adapter_kernels.adapters.table import LayerPrefix


class Generations:
    """The generations of one model that run at this moment."""

    def __init__(self) -> None:
        self._running: WeakKeyDictionary[Any, Generation] = WeakKeyDictionary()

    def __len__(self) -> int:
        return len(self._running)

    def prefixes(
        self, module: nn.Module, past: Any, tokens: int, selection: object
    ) -> dict[Any, LayerPrefix | None] | None:
        """What the generation that `past` belongs to keeps, to be filled and used by one forward pass; None: nothing may.

        Args:
            module: whose forward pass begins.
            past: the cache of keys and values, if there is one.
            tokens: per sequence, without those in the cache.
            selection: which adapters run; with another object than in the pass before, what was kept is dropped.
        """
        if past is None or torch.compiler.is_compiling() or module.training or torch.is_grad_enabled():
            return None
        mark = None if torch.jit.is_tracing() else _mark(past)
        if mark is None:
            return None
        generation = self._running.get(past)
        if generation is None or tokens != 1 or generation.selection is not selection or not generation.goes_on(mark):
            generation = Generation(selection)
            self._running[past] = generation
        generation.mark = mark
        return generation.prefixes


def new_tokens(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Tokens per sequence that a forward pass is called with, those in its cache not counted; 0 if that cannot be told."""
    tokens = kwargs.get("input_ids")
    if tokens is None:
        tokens = kwargs.get("inputs_embeds")
    if tokens is None and args:
        tokens = args[0]  # GPT-2's head passes them by position
    return 0 if tokens is None else tokens.shape[1]


class Generation:
    """The prefixes of one generation, by whatever tells its layers apart."""

    __slots__ = ("mark", "prefixes", "selection")

    def __init__(self, selection: object) -> None:
        self.selection = selection
        self.prefixes: dict[Any, LayerPrefix | None] = {}
        self.mark: Mark = (True, 0)

    def goes_on(self, mark: "Mark") -> bool:
        """Whether the cache still holds what it held after this generation's last forward pass."""
        readable, number = mark
        if readable:
            return number > 0
        # A cache that was empty and had no memory yet starts to count versions with its first update.
        return number == (1 if self.mark == (True, 0) else self.mark[1] + 1)


# (True, tokens in a cache) or (False, version of the tensor that counts them): every forward pass adds one to it, so that
# a reset between two passes shows without reading from the device.
Mark = tuple[bool, int]


def _mark(past: Any) -> Mark | None:
    length = past.get_seq_length() if hasattr(past, "get_seq_length") else None
    if isinstance(length, int):
        return True, length
    if not isinstance(length, Tensor):
        return None
    if length.device.type == "cpu":
        return True, int(length)
    return None if length.is_inference() else (False, length._version)
