"""Adapters in other people's models: attach, load, choose and detach them."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llama_adapter_kernels.adapters.config import AdapterConfig
from llama_adapter_kernels.adapters.selection import Selection
from llama_adapter_kernels.adapters.state import AdapterState
from llama_adapter_kernels.formats import peft
from llama_adapter_kernels.formats.checking import check_state, check_tuned
from llama_adapter_kernels.formats.reading import Choices
from llama_adapter_kernels.formats.registry import read_adapter, tell
from llama_adapter_kernels.integrations import freezing, hooks, tuning
from llama_adapter_kernels.integrations.adapter import ZeroGateAdapter
from llama_adapter_kernels.integrations.attachment import ATTRIBUTE, Attachment
from llama_adapter_kernels.integrations.slot import SLOT, Slot
from llama_adapter_kernels.integrations.target import Target, execution_device, find_target, without_peft
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
    if not isinstance(config, AdapterConfig):
        raise ValueError(f"config: expected an AdapterConfig, got {type(config).__name__}")
    if not isinstance(name, str) or not _NAME.fullmatch(name) or hasattr(Slot, name):
        raise ValueError(f"name: expected letters, digits, _ and - (and no method of a module), got {name!r:.120}")
    target = find_target(model)
    attachment: Attachment | None = getattr(target.stem, ATTRIBUTE, None)
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
    attachment = _connect(target, trainable)
    attachment.add(name, adapter)
    tuning.connect(target, parts, name, attachment)
    attachment.active, attachment.expects_training = name, True
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
        path: a folder or file.
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
    attachment, stem = _attachment(model)
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
            for undo in reversed(attachment.undo):
                undo()
            delattr(stem, ATTRIBUTE)
            attachment.undo, attachment.slots = [], {}  # nothing of the model stays alive through a reference cycle


def set_adapter(model: nn.Module, name: str | None, *, trainable: bool = True) -> None:
    """Makes an adapter the one that runs and learns; the others stay frozen. None: the plain base model.

    Args:
        trainable: its parameters require gradients.

    Raises:
        ValueError: the adapter is unknown.
    """
    attachment, _ = _attachment(model)
    with attachment.lock:
        attachment.check_known(name)
        for other, adapter in attachment.adapters.items():
            adapter.requires_grad_(trainable and other == name)
            if trainable and other == name:
                attachment.thaw(name)
        attachment.active = name
        attachment.expects_training = trainable and name is not None


def attached_adapters(model: nn.Module) -> dict[str, ZeroGateAdapter]:
    """The adapters of a model by name; empty where there are none."""
    stems = _stems(model)
    return dict(getattr(stems[0], ATTRIBUTE).adapters) if stems else {}


@contextmanager
def adapters_per_sequence(
    model: nn.Module, names: Sequence[str | None], *, conditions: Sequence[Tensor | None] | None = None
) -> Iterator[None]:
    """Within the block every sequence of a batch uses an adapter of its own, in one forward pass; generation included.

    Counts for this thread (or asyncio task) only: other threads may serve other mixtures of the same model meanwhile. A
    thread that is started within the block does not inherit it: run its function by `contextvars.copy_context().run`.

    Args:
        names: for each sequence of the batch the name of its adapter, None for the plain base model. Beams and several
            answers per sequence (num_return_sequences) are repeated as generation repeats the sequences. For packed
            sequences: one name for each of them.
        conditions: for each sequence what is added to the prompts of its adapter, [P, hidden] for all layers or
            [L, P, hidden] for its L adapted layers in order; None for nothing.

    Raises:
        ValueError: a name is unknown or a condition does not fit; within the block: the batch has another size.
    """
    attachment, _ = _attachment(model)
    selection = _selection(attachment, names, conditions)
    with attachment.override(selection), methods.repeats_known(without_peft(model), attachment):
        yield


def limit_frozen_prefixes(model: nn.Module, max_bytes: int) -> None:
    """How much memory the prefixes of adapters with `freeze_prefix()` may take; the adapters used longest ago give way.

    An adapter of LLaMA-7B with 10 slots in 30 layers takes 4.9 MB in bfloat16 (2 * 30 * 10 * 4096 * 2 bytes, and gates).

    Raises:
        ValueError: the model has no adapter, or the number is negative.
    """
    if isinstance(max_bytes, bool) or not isinstance(max_bytes, int) or max_bytes < 0:
        raise ValueError(f"max_bytes: expected at least 0, an integer, got {max_bytes!r}")
    _attachment(model)[0].frozen.max_bytes = max_bytes


def _selection(
    attachment: Attachment, names: Sequence[str | None], conditions: Sequence[Tensor | None] | None
) -> Selection:
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise ValueError(f"names: expected a list with one name or None per sequence, got {type(names).__name__}")
    attachment.check_known(*names)
    tunes = [name for name in names if name is not None and attachment.adapters[name].config.tuning is not None]
    if tunes and len(set(names)) > 1:
        raise ValueError(
            f"names: adapter {tunes[0]!r} tunes the model itself, so all sequences of a batch use it; got {len(set(names))} "
            "different ones"
        )
    if conditions is None:
        return Selection(names)
    if len(conditions) != len(names):
        raise ValueError(f"conditions: expected one for each of {len(names)} names, got {len(conditions)}")
    rows: list[int | None] = []
    tensors: dict[str, list[Tensor]] = {}
    for i, (name, condition) in enumerate(zip(names, conditions, strict=True)):
        if condition is None:
            rows.append(None)
            continue
        if name is None:
            raise ValueError(f"conditions: expected None for sequence {i}, which has no adapter, got a tensor")
        adapter = attachment.adapters[name]
        prompts = [adapter.config.prefix_length, adapter.base["hidden_size"]]
        if list(condition.shape) not in (prompts, [len(adapter.layers), *prompts]):
            raise ValueError(
                f"conditions: expected {prompts} or {[len(adapter.layers), *prompts]} for adapter {name!r}, got "
                f"{list(condition.shape)} for sequence {i}"
            )
        mine = tensors.setdefault(name, [])
        if mine and mine[0].dim() != condition.dim():
            raise ValueError(f"conditions: expected one form for all sequences of adapter {name!r}, got both")
        rows.append(len(mine))
        mine.append(condition)
    return Selection(names, conditions={name: torch.stack(mine) for name, mine in tensors.items()}, rows=rows)


def _connect(target: Target, trainable: Sequence[str] | None) -> Attachment:
    """Prepares a model for its first adapter; nothing is left behind where that fails."""
    undo: list[Callable[[], None]] = []
    if target.config is not None:
        attachment = Attachment(target.architecture.keywords, connect.check_call)
    else:
        attachment = Attachment(keywords=False)
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
            undo += methods.exchange(target)
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


def _stems(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if ATTRIBUTE in module.__dict__]


def _attachment(model: nn.Module) -> tuple[Attachment, nn.Module]:
    stems = _stems(model)
    if not stems:
        raise ValueError("model: expected one with an adapter, it has none")
    if len(stems) > 1:
        kinds = ", ".join(type(stem).__name__ for stem in stems)
        raise ValueError(f"model: expected the part that is meant, several have adapters: {kinds}")
    return getattr(stems[0], ATTRIBUTE), stems[0]
