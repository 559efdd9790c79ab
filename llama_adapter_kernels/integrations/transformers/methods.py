"""Methods of a transformers model that mean something else while an adapter is attached.

They are attributes of the model object, in front of those of its class, and go when the last adapter goes.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel

from llama_adapter_kernels.integrations.attachment import ATTRIBUTE, Attachment
from llama_adapter_kernels.integrations.target import Target


def exchange(target: Target) -> list[Callable[[], None]]:
    """Exchanges `save_pretrained` and `set_attn_implementation` of the model. Returns what undoes it."""
    undo = _put(target, "save_pretrained", save_adapters, target.stem)
    return undo + refuse_implementations(target, "detach_adapter(model)")


def refuse_implementations(target: Target, instead: str) -> list[Callable[[], None]]:
    """Exchanges `set_attn_implementation` alone; `instead`: what the user has to do first. Returns what undoes it."""
    return _put(target, "set_attn_implementation", refuse_implementation, instead)


def _put(target: Target, name: str, function: Callable[..., Any], *more: Any) -> list[Callable[[], None]]:
    undo: list[Callable[[], None]] = []
    for module in {id(module): module for module in (target.model, target.stem)}.values():
        if isinstance(module, PreTrainedModel) and name not in module.__dict__:
            module.__dict__[name] = partial(function, module, *more)
            undo.append(partial(_drop, module, name))
    return undo


def _drop(module: nn.Module, name: str) -> None:
    del module.__dict__[name]


def refuse_implementation(model: nn.Module, instead: str, *args: Any, **kwargs: Any) -> None:
    """In place of `set_attn_implementation`."""
    raise ValueError(
        "set_attn_implementation: not while zero-gate attention runs, which would do nothing under another attention; "
        f"{instead} comes first"
    )


def save_adapters(
    model: nn.Module, stem: nn.Module, save_directory: str | os.PathLike[str], *args: Any,
    state_dict: Mapping[str, Tensor] | None = None, **kwargs: Any,
) -> None:  # fmt: skip
    """In place of `save_pretrained`: writes the adapters alone, as PEFT models do.

    A whole model with adapters inside would come back without them from `from_pretrained`, which drops what it does not
    know. One adapter goes to the folder itself, several to a folder of their name each.

    Args:
        state_dict: of the model, where the caller has gathered it already (Trainer under FSDP or DeepSpeed).
    """
    adapters = getattr(stem, ATTRIBUTE).adapters
    paths = {id(module): path for path, module in model.named_modules()} if state_dict else {}
    for name, adapter in adapters.items():
        folder = os.fspath(save_directory) if len(adapters) == 1 else os.path.join(save_directory, name)
        tensors = {
            f"{place}.{parameter}": state_dict[f"{paths[id(part)]}.{parameter}"]
            for place, part in adapter.parts().items()
            for parameter, _ in part.named_parameters()
            if state_dict and f"{paths[id(part)]}.{parameter}" in state_dict
        }
        adapter.save_pretrained(folder, tensors=tensors)


@contextmanager
def repeats_known(model: Any, attachment: Attachment) -> Iterator[None]:
    """Within the block `generate` tells the thread's Override how often it repeats every sequence (beams, answers)."""
    if not isinstance(model, GenerationMixin):
        yield
        return
    with attachment.lock:
        attachment.blocks += 1
        if attachment.blocks == 1:
            for name, function in (("generate", _generate), ("_expand_inputs_for_generation", _expand)):
                model.__dict__[name] = partial(function, attachment, getattr(model, name))
    try:
        yield
    finally:
        with attachment.lock:
            attachment.blocks -= 1
            if not attachment.blocks:
                for name in ("generate", "_expand_inputs_for_generation"):
                    ours = model.__dict__.pop(name)
                    if ours.args[1] != getattr(model, name):  # it was an attribute of the model before, too
                        model.__dict__[name] = ours.args[1]


def _generate(attachment: Attachment, generate: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    try:
        return generate(*args, **kwargs)
    finally:
        _set_repeats(attachment, 1)


def _expand(attachment: Attachment, expand: Callable[..., Any], expand_size: int = 1, **kwargs: Any) -> Any:
    _set_repeats(attachment, expand_size)
    return expand(expand_size=expand_size, **kwargs)


def _set_repeats(attachment: Attachment, repeats: int) -> None:
    override = attachment.current_override()
    if override is not None:
        override.repeats = repeats
