"""Which of a model's adapters run: one for whole batches, or one for each sequence."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from llama_adapter_kernels.adapters.selection import Selection
from llama_adapter_kernels.integrations.adapter import ZeroGateAdapter
from llama_adapter_kernels.integrations.attachment import ATTRIBUTE, Attachment
from llama_adapter_kernels.integrations.target import without_peft
from llama_adapter_kernels.integrations.transformers import methods


def set_adapter(model: nn.Module, name: str | None, *, trainable: bool = True) -> None:
    """Makes an adapter the one that runs and learns; the others stay frozen. None: the plain base model.

    Args:
        trainable: its parameters require gradients.

    Raises:
        ValueError: the adapter is unknown.
    """
    attachment, _ = attachment_of(model)
    attachment.check_manager(None, "set_adapter(name) or disable_adapter()")
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
    attachment, _ = attachment_of(model)
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
    attachment_of(model)[0].frozen.max_bytes = max_bytes


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
    if not isinstance(conditions, Sequence | Tensor):
        raise ValueError(
            f"conditions: expected a list with one tensor or None per name, got {type(conditions).__name__}"
        )
    if len(conditions) != len(names):
        raise ValueError(f"conditions: expected one for each of {len(names)} names, got {len(conditions)}")
    rows: list[int | None] = []
    tensors: dict[str, list[Tensor]] = {}
    for i, (name, condition) in enumerate(zip(names, conditions, strict=True)):
        if condition is None:
            rows.append(None)
            continue
        if not isinstance(condition, Tensor):
            raise ValueError(f"conditions: expected a tensor or None for sequence {i}, got {type(condition).__name__}")
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


def _stems(model: nn.Module) -> list[nn.Module]:
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    return [module for module in model.modules() if ATTRIBUTE in module.__dict__]


def attachment_of(model: nn.Module) -> tuple[Attachment, nn.Module]:
    """What is attached to a model, and the module that it takes part in.

    Raises:
        ValueError: nothing is, or to several parts, or it is no module.
    """
    stems = _stems(model)
    if not stems:
        raise ValueError("model: expected one with an adapter, it has none")
    if len(stems) > 1:
        kinds = ", ".join(type(stem).__name__ for stem in stems)
        raise ValueError(f"model: expected the part that is meant, several have adapters: {kinds}")
    return getattr(stems[0], ATTRIBUTE), stems[0]
