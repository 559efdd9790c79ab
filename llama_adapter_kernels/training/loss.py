"""The loss of a packed batch: only response tokens meet the vocabulary, and never all of them at once.

With a vocabulary of 128k the logits of 8k tokens take 4 GB in float32, their gradient as much again. Here a chunk of tokens
at a time goes through the head, and since the head is frozen, the gradient of its input is all that is kept. Memory is that
of the head's weight and of one chunk.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from transformers.modeling_utils import unwrap_model

from llama_adapter_kernels.integrations.conditioning import ATTRIBUTE as CONDITIONING
from llama_adapter_kernels.integrations.target import execution_device
from llama_adapter_kernels.training.packing import live_positions

# Logits of one chunk, in bytes: on a CPU they stay near the caches, on a GPU the products fill the device.
CHUNK_BYTES = {"cpu": 32 * 2**20, "cuda": 256 * 2**20}
_SEPARATE = "_zero_gate_head_is_separate"  # on a model: whether its logits are its head's output and nothing more


def response_loss(model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, int]:
    """(sum of the cross-entropies of all response tokens in float32, their number) of a packed batch.

    A batch without any gives 0, with gradients of 0.
    """
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "media")}
    positions, targets = live_positions(batch["labels"])
    head = separate_head(unwrap_model(model))
    with _seeing(model, batch.get("media")), nullcontext() if head is None else _passed_through(head):
        found = model(**inputs, use_cache=False, logits_to_keep=positions).logits[0]
    if head is None:  # what found holds are logits
        return nn.functional.cross_entropy(found.float(), targets, reduction="sum"), len(targets)
    return head_loss(head, found, targets), len(targets)


def head_loss(head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    """Sum of the cross-entropies (nats, float32; float64 for float64) of `targets` [N] under `head(hidden)`, [N, hidden].

    A frozen linear layer gets by with two matrix products; whatever else a head may be is computed again in the backward
    pass, chunk by chunk.
    """
    if _is_frozen_linear(head):
        operands = _lower_precision(hidden, head.weight, head.bias)
        with torch.autocast(hidden.device.type, enabled=False):
            loss: Tensor = _FrozenHeadLoss.apply(operands[0], targets, *operands[1:])
        return loss
    vocabulary = head.out_features if isinstance(head, nn.Linear) else head.weight.shape[0]
    total = hidden.new_zeros((), dtype=_accumulator(hidden.dtype)) + 0.0 * hidden.sum()
    rows = chunk_rows(vocabulary, hidden)
    for part, target in zip(hidden.split(rows), targets.split(rows), strict=True):
        if len(target):
            total = total + checkpoint(_plain_loss, head, part, target, use_reentrant=False)
    return total


def chunk_rows(vocabulary: int, hidden: Tensor) -> int:
    """How many tokens at a time meet a vocabulary."""
    size: int = _accumulator(hidden.dtype).itemsize
    return max(1, CHUNK_BYTES["cpu" if hidden.device.type == "cpu" else "cuda"] // (vocabulary * size))


def separate_head(model: Any) -> nn.Module | None:
    """The output layer, where a model's logits are its output and nothing more; None where they are not.

    Some architectures scale or cap the logits afterwards. Instead of knowing which, this compares both ways, once.
    """
    known: bool | None = getattr(model, _SEPARATE, None)
    head: nn.Module | None = model.get_output_embeddings()
    if known is None:
        known = head is not None and _logits_are_of(model, head)
        setattr(model, _SEPARATE, known)
    return head if known else None


@torch.no_grad()
def _logits_are_of(model: Any, head: nn.Module) -> bool:
    tokens = torch.arange(4, device=execution_device(model.get_input_embeddings()))[None]  # weights may be elsewhere
    logits = model(input_ids=tokens, use_cache=False).logits
    with _passed_through(head):
        hidden = model(input_ids=tokens, use_cache=False).logits
    same: bool = torch.allclose(head(hidden), logits, rtol=1e-3, atol=1e-3)
    return same


@contextmanager
def _passed_through(head: nn.Module) -> Iterator[None]:
    """Within the context the head gives back its input: a model's "logits" are the hidden states.

    The model is called as a whole all the same, so that whatever is wrapped around it (DDP, FSDP) has its part.
    """
    before = head.__dict__.get("forward")
    head.forward = _same  # one function, not a new one each time: a compiled model would be compiled again
    try:
        yield
    finally:
        if before is None:
            del head.forward
        else:
            head.forward = before


def _same(hidden: Tensor) -> Tensor:
    return hidden


def _is_frozen_linear(head: nn.Module) -> bool:
    hooks = head._forward_hooks or head._forward_pre_hooks or head._backward_hooks or "forward" in head.__dict__
    plain = type(head) is nn.Linear and type(head.weight) is nn.Parameter and not hooks
    return plain and not any(parameter.requires_grad for parameter in head.parameters())


def _lower_precision(*tensors: Any) -> list[Any]:
    """The tensors, some of which may be None; within torch.autocast in the dtype that a linear layer computes in there."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return list(tensors)
    dtype = torch.get_autocast_dtype(kind)
    return [tensor if tensor is None or tensor.dtype == torch.float64 else tensor.to(dtype) for tensor in tensors]


def _plain_loss(head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    logits = head(hidden)
    return nn.functional.cross_entropy(logits.to(_accumulator(logits.dtype)), targets, reduction="sum")


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class _FrozenHeadLoss(torch.autograd.Function):
    """The loss and at once its gradient with respect to the hidden states: softmax minus the target, times the weight."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rows = min(chunk_rows(len(weight), hidden), max(1, len(hidden)))
        logits = hidden.new_empty(rows, len(weight), dtype=weight.dtype)
        exact = _accumulator(weight.dtype)
        work = logits if weight.dtype == exact else torch.empty_like(logits, dtype=exact)
        total = hidden.new_zeros((), dtype=exact)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), rows):
            part, target = hidden[start : start + rows], targets[start : start + rows, None]
            raw, p = logits[: len(part)], work[: len(part)]
            torch.mm(part, weight.T, out=raw)
            if bias is not None:
                raw += bias
            if p is not raw:
                p.copy_(raw)
            largest = p.amax(1, keepdim=True)
            chosen = p.gather(1, target)
            sums = p.sub_(largest).exp_().sum(1, keepdim=True)
            total += (sums.log() + largest - chosen).sum()
            if gradient is not None:
                p.div_(sums)
                p.scatter_(1, target, p.gather(1, target) - 1)
                if p is not raw:
                    raw.copy_(p)
                torch.mm(raw, weight, out=gradient[start : start + len(part)])
        ctx.gradient, ctx.rows = gradient, rows
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, doutput: Tensor) -> tuple[Tensor, None, None, None]:
        gradient = ctx.gradient
        if gradient is None:
            raise RuntimeError("the loss can be differentiated once: its gradient is not kept after that")
        ctx.gradient = None
        for part in gradient.split(ctx.rows):  # in float32: one over the number of tokens, in bfloat16, is off by 0.4%
            part.copy_(part.to(doutput.dtype) * doutput)
        return gradient, None, None, None


def _seeing(model: nn.Module, media: Sequence[Path | None] | None) -> AbstractContextManager[None]:
    """The model sees the pictures, or hears the sounds, of a packed batch, one for each sequence."""
    if media is None:
        return nullcontext()
    seeing: AbstractContextManager[None] = getattr(unwrap_model(model), CONDITIONING).seeing(media)
    return seeing
