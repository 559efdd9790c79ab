"""Adapters in other people's models: attach, load and detach them."""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from llama_adapter_kernels.adapters.config import AdapterConfig
from llama_adapter_kernels.adapters.state import AdapterState
from llama_adapter_kernels.formats import peft
from llama_adapter_kernels.formats.checking import check_state, check_tuned
from llama_adapter_kernels.formats.reading import Choices
from llama_adapter_kernels.formats.registry import read_adapter, tell
from llama_adapter_kernels.integrations import freezing, hooks, quantised, tuning
from llama_adapter_kernels.integrations.adapter import ZeroGateAdapter
from llama_adapter_kernels.integrations.attachment import ATTRIBUTE, Attachment
from llama_adapter_kernels.integrations.choosing import attachment_of
from llama_adapter_kernels.integrations.slot import SLOT, Slot
from llama_adapter_kernels.integrations.target import Target, execution_device, find_target
from llama_adapter_kernels.integrations.transformers import connect, methods

_NAME = re.compile(r"[A-Za-z0-9_-]{1,100}")


def attach_adapter(
    model: nn.Module, config: AdapterConfig, name: str = "default", *, trainable: Sequence[str] | None = None
) -> ZeroGateAdapter:
    """Gives a model a new adapter: prompts from N(0, 1), gates 0, so that at first nothing changes.

    The first adapter freezes the model and runs from now on; its parameters (float32, part of `model.parameters()`)
    require gradients. Further ones wait for `set_adapter`.

    Args:
        model: of one of the types in docs/models.md, with or without a head, PEFT around it or not.
        config: see AdapterConfig.
        name: of the adapter in this model.
        trainable: names of parameters or modules of the model that stay trainable, such as "classifier"; `*` stands for
            anything ("*lora*"). None: no one, with a warning where that undoes a choice.

    Returns:
        The adapter: its parameters, `num_parameters()`, `gates()`, `save_pretrained(path)`, `freeze_prefix()`.

    Raises:
        ValueError: the model takes no adapter, the config does not fit it, or the name is taken. The model is as before.
    """
    return attach(model, config, name, trainable=trainable)


def attach(
    model: nn.Module,
    config: AdapterConfig,
    name: str,
    *,
    trainable: Sequence[str] | None = None,
    manager: str | None = None,
) -> ZeroGateAdapter:
    """`attach_adapter` for a library that keeps the books of a model's adapters; `manager`: its name."""
    if not isinstance(config, AdapterConfig):
        raise ValueError(f"config: expected an AdapterConfig, got {type(config).__name__}")
    if not isinstance(name, str) or not _NAME.fullmatch(name) or hasattr(Slot, name):
        raise ValueError(f"name: expected letters, digits, _ and - (and no method of a module), got {name!r:.120}")
    target = find_target(model)
    attachment: Attachment | None = getattr(target.stem, ATTRIBUTE, None)
    if attachment is not None:
        attachment.check_manager(manager, "add_adapter(name, lak.ZeroGateConfig(...)) or load_adapter(path, name)")
    if attachment is not None and name in attachment.adapters:
        raise ValueError(
            f"adapter {name!r}: expected a name that is not taken; detach_adapter(model, {name!r}) frees it"
        )
    _check_rows(target, config)
    devices = [execution_device(module) for module in target.attentions]
    parts = {} if config.tuning is None else tuning.build(target, config.tuning)
    adapter = ZeroGateAdapter(config, target.facts(), devices, parts)
    if attachment is not None:
        adapter.requires_grad_(False)
        attachment.add(name, adapter)
        tuning.connect(target, parts, name, attachment)
        return adapter
    attachment = _connect(target, trainable, manager)
    attachment.add(name, adapter)
    tuning.connect(target, parts, name, attachment)
    attachment.active, attachment.expects_training = name, manager is None
    return adapter


def load_adapter(
    model: nn.Module,
    path: Any,
    name: str = "default",
    *,
    format: str = "auto",
    gate: str | None = None,
    prefix_length: int | None = None,
    legacy_rows: bool | None = None,
    trainable: Sequence[str] | None = None,
) -> ZeroGateAdapter:
    """Attaches a saved adapter, of this package or of another project. Everything is read and checked first.

    What a foreign file does not say is told by the arguments or decided as docs/formats.md describes, and logged (INFO);
    parts of it that have no place here are kept, saved again with the adapter, and named in a warning.

    Args:
        model, name, trainable: as for `attach_adapter`.
        path: a folder or file, or the name of a repository on the Hugging Face hub.
        format: "native", one of docs/formats.md, or "auto": recognised by the names of its tensors.
        gate: "tanh" or "identity", for official V1 files. None: tanh.
        prefix_length: P, for files that have only P times the number of layers.
        legacy_rows: for LitGPT files: written by a release from 0.5.5 on.

    Raises:
        ValueError: it belongs to another model (both are named), its files are not those of an adapter, or as for
            `attach_adapter`.
        OSError: there are no such files.
    """
    target = find_target(model)
    own = target.facts()
    reading = read_adapter(path, format, Choices(gate, prefix_length, legacy_rows, own))
    state = reading.state
    different = [fact for fact in own if own[fact] != state.base.get(fact, own[fact])]
    if different:
        theirs = ", ".join(f"{fact} {state.base[fact]}" for fact in different)
        ours = ", ".join(f"{fact} {own[fact]}" for fact in different)
        raise ValueError(f"{path}: the adapter was made for a model with {theirs}; this model has {ours}")
    if reading.format == "litgpt" and state.config.prefix_rows == "own" and any(map(_has_key_norm, target.attentions)):
        raise ValueError(
            f"{path}: LitGPT does not norm the keys of prompts, as this model's adapters do: no such file fits it"
        )
    if reading.format == "peft":
        state = peft.with_output_bias(state, dict(enumerate(map(_output_bias, target.attentions))))
    adapter = attach_state(model, state, name, source=str(path), trainable=trainable)
    tell(reading)
    return adapter


def attach_state(
    model: nn.Module, state: AdapterState, name: str = "default", *, source: str, trainable: Sequence[str] | None = None
) -> ZeroGateAdapter:
    """Attaches an adapter that a file format has read; `source` names it in messages. Otherwise as `load_adapter`."""
    target = find_target(model)
    check_state(replace(state, base=target.facts()), source)
    if state.config.tuning is not None:
        check_tuned(state, tuning.expected_shapes(target, state.config.tuning), source)
    adapter = attach_adapter(model, state.config, name, trainable=trainable)
    adapter.load_tensors(state, source)
    return adapter


def _has_key_norm(attention: Any) -> bool:
    return any(getattr(attention, name, None) is not None for name in ("k_norm", "k_layernorm"))


def _output_bias(attention: Any) -> Tensor | None:
    bias: Tensor | None = getattr(getattr(attention, "o_proj", None), "bias", None)
    return bias


def _check_rows(target: Target, config: AdapterConfig) -> None:
    names = ("q_proj", "k_proj", "v_proj")
    if config.prefix_rows == "legacy" and not all(hasattr(target.attentions[0], name) for name in names):
        raise ValueError(
            f"prefix_rows: legacy needs a model with {', '.join(names)}, got a {target.architecture.model_type}"
        )


def detach_adapter(model: nn.Module, name: str | None = None) -> None:
    """Removes an adapter. With the last one the model becomes what it was: attention, hooks and `requires_grad`.

    Args:
        name: of the adapter; None: the only one.

    Raises:
        ValueError: the model has none, several and no name is given, it is in use, or the active one of several.
    """
    attachment, stem = attachment_of(model)
    attachment.check_manager(None, "delete_adapter(name) or unload()")
    with attachment.lock:
        if name is None:
            if len(attachment.adapters) > 1:
                names = ", ".join(map(repr, attachment.adapters))
                raise ValueError(f"detach_adapter: expected the name of one of several adapters ({names}), got none")
            name = next(iter(attachment.adapters))
        attachment.check_known(name)
        if name == attachment.active and len(attachment.adapters) > 1:
            raise ValueError(
                f"adapter {name!r}: active while others remain; set_adapter(model, another one or None) comes first"
            )
        attachment.remove(name)
        if not attachment.adapters:
            remove(attachment, stem)


def remove(attachment: Attachment, stem: nn.Module) -> None:
    """Makes the model what it was, once no adapter is left."""
    for undo in reversed(attachment.undo):
        undo()
    delattr(stem, ATTRIBUTE)
    attachment.undo, attachment.slots = [], {}  # nothing of the model stays alive through a reference cycle


def _connect(target: Target, trainable: Sequence[str] | None, manager: str | None) -> Attachment:
    """Prepares a model for its first adapter; nothing is left behind where that fails."""
    undo: list[Callable[[], None]] = []
    if target.config is not None:
        attachment = Attachment(target.architecture.keywords, connect.check_call)
    else:
        attachment = Attachment(keywords=False)
    attachment.manager = manager
    try:
        before = freezing.freeze(target.outer, trainable, freezing.heads(target.model))
        undo.append(partial(freezing.restore, target.outer, before))
        for number, module in enumerate(target.attentions):
            slot = Slot(number, target.heads, target.architecture.project, attachment)
            slot.train(module.training)
            attachment.slots[number] = slot
            module.add_module(SLOT, slot)
            undo.append(partial(_remove_slot, module))
            if target.architecture.compute is not None:
                undo.append(partial(_change_class, module, type(module)))
                _change_class(module, target.architecture.compute())
        if target.config is not None:
            undo += connect.connect(target)
            undo += methods.exchange(target) if manager is None else methods.refuse_implementations(target, "unload()")
        undo += quantised.keep_layout(target.outer)
        undo.append(partial(hooks.remove, target.stem))
        hooks.register(target.stem, attachment.keywords)
    except BaseException:
        for action in reversed(undo):
            action()
        raise
    attachment.undo = undo
    setattr(target.stem, ATTRIBUTE, attachment)
    return attachment


def _remove_slot(module: nn.Module) -> None:
    del module._modules[SLOT]


def _change_class(module: nn.Module, kind: type) -> None:
    module.__class__ = kind
    if "_old_forward" in module.__dict__:  # accelerate calls the forward pass that it found
        module._old_forward = kind.forward.__get__(module)  # type: ignore[attr-defined]
