"""What the demo measures: the held-out loss, and a training step with three ways to compute the same attention."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from llama_adapter_kernels.ops import reference
from llama_adapter_kernels.ops.backends import use_backend
from llama_adapter_kernels.training.data import Example
from llama_adapter_kernels.training.packing import pack
from llama_adapter_kernels.training.trainer import response_loss

_BATCH_TOKENS = 4096  # of a packed evaluation batch, more or less
TIMED_SHAPE = (8, 256)  # sequences, tokens
ROUNDS = 5


@torch.no_grad()
def held_out_loss(model: nn.Module, examples: Sequence[Example]) -> float:
    """Mean cross-entropy over all response tokens of the examples, in nats per token."""
    training = model.training
    model.eval()
    total, count = 0.0, 0
    for batch in _batches(examples):
        loss, tokens = response_loss(model, pack(batch))
        total, count = total + loss.item(), count + tokens
    model.train(training)
    return total / count


def step_times(model: nn.Module) -> dict[str, float]:
    """Median seconds of a training step (forward and backward) for each way to compute the attention.

    The ways take turns, so that a busy moment of the machine hits all of them.
    """
    tokens = torch.randint(3, model.config.vocab_size, TIMED_SHAPE, generator=torch.Generator().manual_seed(0))
    ways: dict[str, Callable[..., Tensor] | None] = {
        "fused (this package)": None,
        "two scaled_dot_product_attention calls": two_calls,
        "eager": eager,
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for round_number in range(ROUNDS + 1):
        for name, way in ways.items():
            with attention_replaced(way):
                started = time.perf_counter()
                model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
                if round_number > 0:  # the first one warms up
                    seconds[name].append(time.perf_counter() - started)
            model.zero_grad(set_to_none=True)
    return {name: median(values) for name, values in seconds.items()}


def two_calls(query: Tensor, key: Tensor, value: Tensor, *prefix: Tensor, **options: Any) -> Tensor:
    """The best there is without a fused kernel: two attention calls and a multiply-add."""
    prefix_key, prefix_value, gate = prefix
    scale, mask = options["scale"], options["attn_mask"]
    words = scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=options["is_causal"], scale=scale, enable_gqa=True
    )
    prefix_key, prefix_value = (t.expand(query.shape[0], -1, -1, -1) for t in (prefix_key, prefix_value))
    adapted = scaled_dot_product_attention(query, prefix_key, prefix_value, scale=scale, enable_gqa=True)
    return words + gate.to(query.dtype)[:, :, None, None] * adapted


def eager(query: Tensor, key: Tensor, value: Tensor, *prefix: Tensor, **options: Any) -> Tensor:
    """Matrix products and softmax one after the other, as the original implementation has it."""
    prefix_key, prefix_value, gate = prefix
    group, scale, mask = query.shape[1] // key.shape[1], options["scale"], options["attn_mask"]
    key, value, prefix_key, prefix_value = (
        t.repeat_interleave(group, dim=1) for t in (key, value, prefix_key, prefix_value)
    )
    scores = scale * (query @ key.transpose(-1, -2))
    if options["is_causal"]:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    words = torch.softmax(scores, dim=-1) @ value
    adapted = torch.softmax(scale * (query @ prefix_key.transpose(-1, -2)), dim=-1) @ prefix_value
    return words + gate.to(query.dtype)[:, :, None, None] * adapted


@contextmanager
def attention_replaced(way: Callable[..., Tensor] | None) -> Iterator[None]:
    """Within the context the adapted layers compute their attention by `way`; None: by the package's own kernels.

    `way` stands in for the eager reference, which the public functions call with checked arguments.
    """
    if way is None:
        yield
        return
    original = reference.forward
    reference.forward = lambda *tensors, **options: (way(*tensors, **options), None)
    try:
        with use_backend("reference"):
            yield
    finally:
        reference.forward = original


def _batches(examples: Sequence[Example]) -> Iterator[list[Example]]:
    batch: list[Example] = []
    for example in examples:
        if batch and sum(len(other) for other in batch) + len(example) > _BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(example)
    yield batch
