"""Connects transformers models with the attention function of this package, and disconnects them."""

import copy
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_flash_attention_utils import FlashAttentionKwargs
from transformers.utils import TransformersKwargs

from llama_adapter_kernels.integrations.slot import ROUTING
from llama_adapter_kernels.integrations.target import Target
from llama_adapter_kernels.integrations.transformers.attention import IMPLEMENTATION, attention
from llama_adapter_kernels.integrations.transformers.masks import zero_gate_mask

# Registered when this module is imported: unpickling a model with an adapter imports it, through the model's hook.
AttentionInterface.register(IMPLEMENTATION, attention)
AttentionMaskInterface.register(IMPLEMENTATION, zero_gate_mask)

# What transformers' own models hand to one another besides the parameters that their signatures name.
_PASSED_ON = frozenset(TransformersKwargs.__annotations__) | frozenset(FlashAttentionKwargs.__annotations__) | {
    ROUTING, "use_cache", "cache_position", "return_dict", "logits_to_keep", "labels", "softcap", "s_aux", "position_bias",
    "cache", "mm_token_type_ids", "token_type_ids", "past_key_values", "position_ids",
}  # fmt: skip
_signatures: dict[type, frozenset[str]] = {}


def connect(target: Target) -> list[Callable[[], None]]:
    """Makes the model compute attention here. Returns what undoes it.

    The model gets a configuration of its own: transformers reads there which attention to use, and several models may
    share one.

    Raises:
        ValueError: an attention module does not ask transformers' attention interface.
    """
    for module in target.attentions:
        if target.architecture.compute is None and not _asks_the_interface(type(module)):
            raise ValueError(
                f"model: expected {type(module).__name__} to call transformers' attention interface "
                "(ALL_ATTENTION_FUNCTIONS), which it does not; an Architecture's compute= gives a subclass that does"
            )
    config = _own_configuration(target)
    before = config._attn_implementation
    config._attn_implementation = IMPLEMENTATION
    return [partial(setattr, config, "_attn_implementation", before)]


def check_call(module: nn.Module, kwargs: dict[str, Any], undo: str = "detach_adapter(model)") -> None:
    """Called before every forward pass; `undo`: what gives the model back as it was.

    Raises:
        TypeError: a keyword argument that nothing reads.
        ValueError: the attention implementation was changed after the adapter was attached.
    """
    known = _signatures.get(type(module))
    if known is None:
        known = _signatures[type(module)] = _PASSED_ON | frozenset(inspect.signature(type(module).forward).parameters)
    for name in kwargs:
        if name not in known:
            raise TypeError(f"{name}: unexpected keyword argument, {type(module).__name__}.forward does not know it")
    implementation = module.config._attn_implementation
    if implementation != IMPLEMENTATION:
        raise ValueError(
            f"attention implementation: expected {IMPLEMENTATION!r} as long as an adapter is attached, got "
            f"{implementation!r}, with which the adapter would do nothing; {undo} comes first"
        )


def _own_configuration(target: Target) -> Any:
    """Gives the model a copy of its configuration. Returns the copy of the adapted part's."""
    holders = [module for module in target.outer.modules() if "config" in module.__dict__]
    copies: dict[int, Any] = {}  # copy.deepcopy notes here, by id and at any depth, what became of what
    for module in holders:
        copy.deepcopy(module.config, copies)
    for module in holders:
        module.config = copies.get(id(module.config), module.config)
    return copies[id(target.config)]


def _asks_the_interface(kind: type) -> bool:
    for base in kind.__mro__:
        if base is nn.Module:
            return False
        try:
            if "ALL_ATTENTION_FUNCTIONS" in inspect.getsource(base):
                return True
        except (OSError, TypeError):  # no source at hand: its results tell
            return True
    return False
