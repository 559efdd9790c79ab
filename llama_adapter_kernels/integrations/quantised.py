"""Base models with quantised weights: do they let gradients pass, and what transformers' Trainer must be told."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from llama_adapter_kernels.integrations.attachment import ATTRIBUTE
from llama_adapter_kernels.integrations.target import execution_device, find_target, layers_of

_PEFT = "_hf_peft_config_loaded"  # how transformers notes that a model has adapters of PEFT
_PACKS = "support_avx512bf16_for_cpu"  # of bitsandbytes' 4-bit layers


@contextmanager
def counts_as_adapted(model: Any) -> Iterator[None]:
    """Within the block transformers knows that a quantised model with an adapter has something to train.

    Its Trainer refuses such models when it is made, unless PEFT has adapted them. Afterwards the mark would be in the way:
    with activation checkpointing transformers lets gradients run down to the embeddings of models that have it.
    """
    quantised = getattr(model, "is_quantized", False) and not getattr(model, _PEFT, False)
    if not quantised or not _has_adapter(model):
        yield
        return
    check_gradients_pass(model)
    setattr(model, _PEFT, True)
    try:
        yield
    finally:
        setattr(model, _PEFT, False)


def keep_layout(model: nn.Module) -> list[Callable[[], None]]:
    """Keeps bitsandbytes from packing 4-bit weights for inference on a CPU. Returns what allows it again.

    Once packed, which a forward pass in evaluation mode does, they let no gradient pass, without a word.
    """
    undo: list[Callable[[], None]] = []
    for module in model.modules():
        before = getattr(module, _PACKS, None)
        if before is not None:
            setattr(module, _PACKS, False)
            undo.append(partial(setattr, module, _PACKS, before))
    return undo


def check_gradients_pass(model: Any) -> None:
    """Tries the linear layers of the model's last layer that are no plain ones, each kind once.

    Raises:
        ValueError: no gradient gets through one of them.
    """
    tried: set[tuple[type, type]] = set()
    dtype = next((p.dtype for p in model.get_input_embeddings().parameters()), torch.float32)
    for name, module in layers_of(find_target(model))[-1].named_modules():
        kind = type(module), type(getattr(module, "weight", None))
        width = getattr(module, "in_features", None)
        if width is None or kind == (nn.Linear, nn.Parameter) or kind in tried:
            continue
        tried.add(kind)
        hidden = torch.ones(1, 2, width, dtype=dtype, device=execution_device(module), requires_grad=True)
        try:
            with torch.enable_grad():
                module(hidden).float().sum().backward()
            problem = "none arrives" if hidden.grad is None else ""
        except (RuntimeError, NotImplementedError) as error:
            problem = str(error).strip().partition("\n")[0]
        if problem:
            raise ValueError(
                f"model: expected linear layers that gradients pass through, {name} of the last layer "
                f"({kind[0].__name__}, {kind[1].__name__}) lets none pass: {problem}"
            )


def _has_adapter(model: Any) -> bool:
    return any(hasattr(module, ATTRIBUTE) for module in model.modules())
