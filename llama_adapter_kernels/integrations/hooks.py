"""What happens around a forward pass of a model with adapters."""

import warnings
from typing import Any

import torch
from torch import nn

from llama_adapter_kernels.integrations.attachment import ATTRIBUTE, Attachment
from llama_adapter_kernels.integrations.generations import new_tokens
from llama_adapter_kernels.integrations.slot import ROUTING


def register(module: nn.Module, keywords: bool) -> None:
    """Registers the hooks below with the module whose forward passes adapters take part in."""
    module.register_forward_pre_hook(before_forward, with_kwargs=True)
    if not keywords:
        module.register_forward_hook(after_forward, always_call=True)


def remove(module: nn.Module) -> None:
    """Removes them, also from a copy of the module that they were registered with."""
    tables: tuple[tuple[Any, Any, tuple[Any, ...]], ...] = (
        (before_forward, module._forward_pre_hooks, (module._forward_pre_hooks_with_kwargs,)),
        (
            after_forward,
            module._forward_hooks,
            (module._forward_hooks_with_kwargs, module._forward_hooks_always_called),
        ),
    )
    for function, hooks, flags in tables:
        for key in [key for key, hook in hooks.items() if hook is function]:
            del hooks[key]
            for flag in flags:
                flag.pop(key, None)


def before_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
    """Decides once per forward pass which adapters run, and hands that down to the attention modules."""
    attachment: Attachment = getattr(module, ATTRIBUTE)
    if attachment.check is not None:
        attachment.check(module, kwargs)
    if module.training and attachment.expects_training:
        _warn_if_frozen(attachment)
        _refuse_offloaded(attachment)
    past = kwargs.get("past_key_values")
    routing = attachment.routing(module, past, 0 if past is None else new_tokens(args, kwargs))
    if attachment.keywords:
        kwargs[ROUTING] = routing
    elif not torch.compiler.is_compiling():
        attachment.set_running(routing)
    return args, kwargs


def after_forward(module: nn.Module, args: Any, output: Any) -> None:
    """Ends what `before_forward` began, for models whose attention modules no keyword argument reaches."""
    if not torch.compiler.is_compiling():
        getattr(module, ATTRIBUTE).set_running(None)


def _warn_if_frozen(attachment: Attachment) -> None:
    """Others freeze whatever is not theirs (PEFT's get_peft_model): an adapter would stop to learn without a word."""
    name = attachment.active
    if name is None or not torch.is_grad_enabled():
        return
    if any(parameter.requires_grad for parameter in attachment.adapters[name].parameters()):
        return
    attachment.expects_training = False
    warnings.warn(
        f"adapter {name!r}: something froze its parameters after it was attached (PEFT's get_peft_model does); "
        f"lak.set_adapter(model, {name!r}) lets it train; with trainable=False it stays frozen without this warning",
        stacklevel=2,
    )


def _refuse_offloaded(attachment: Attachment) -> None:
    """Offloaded parameters are copied for every forward pass: the copies would get the gradients, and nobody else.

    Raises:
        ValueError: the active adapter's are.
    """
    name = attachment.active
    if name is not None and torch.is_grad_enabled() and any(p.is_meta for p in attachment.adapters[name].parameters()):
        raise ValueError(
            f"adapter {name!r}: its parameters were offloaded, where no gradient reaches them; to train it, offload the "
            "model first and attach the adapter then"
        )
