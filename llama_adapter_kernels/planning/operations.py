"""Floating-point operations and bytes of a training step, counted part by part.

The base model is frozen: backward is one product per forward product, for the gradient of its input, in the layers above the
lowest adapted one; there the attention's own input needs no gradient. Layers below run forward alone. `tests/planning`
compares products with torch's counter, to the operation.

Bytes are those that separate kernels read and write, as transformers computes a norm (twelve kernels, forward and backward),
or those of one fused kernel each (torch.compile, liger-kernel).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from llama_adapter_kernels.planning.shapes import ModelShape

BACKWARD_OVER_FORWARD = 2.5  # attention: five products, the scores computed again among them, against two
# Bytes per element of the residual stream (norms: in bfloat16, float32 within), per element of query and key (rotation), per
# element of the feed-forward part (activation), with separate kernels and with one each.
_NORM = {"separate": (36, 74), "fused": (4, 8)}
_ROTATION = {"separate": (20, 24), "fused": (4, 4)}
_ACTIVATION = {"separate": (10, 18), "fused": (6, 10)}
_RESIDUAL = (6, 6)


@dataclass(frozen=True)
class Adapter:
    """Prompts of `prefix` tokens in the topmost `layers` layers."""

    layers: int
    prefix: int = 10


@dataclass(frozen=True)
class Batch:
    """What is computed at once.

    Attributes:
        tokens: of all sequences.
        pairs: of a query and a key that it sees, over all sequences.
        responses: tokens that are predicted: those meet the head.
    """

    tokens: float
    pairs: float
    responses: float

    @classmethod
    def packed(cls, lengths: Sequence[int], responses: float) -> "Batch":
        """Causal sequences one after the other."""
        return cls(sum(lengths), sum(length * (length + 1) / 2 for length in lengths), responses)


@dataclass(frozen=True)
class Part:
    """Operations and bytes of one part of a step. kind: products, attention or memory, by what limits its kernels."""

    name: str
    kind: str
    flop: float
    bytes: float
    launches: float


def step_parts(
    shape: ModelShape, adapter: Adapter, batch: Batch, *, width: int = 2, fused: bool = False, low: bool = False
) -> list[Part]:
    """The parts of forward and backward of one micro-batch.

    Args:
        width: bytes of a number in the dtype of the weights.
        fused: norms, rotations and activations are one kernel each.
        low: adapted layers are computed again in the backward pass.
    """
    tokens, adapted = batch.tokens, adapter.layers
    query, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    forward, backward = shape.layers, adapted  # layers that run so
    weights = shape.attention_weights + shape.inner_weights
    into_lowest = shape.hidden * (query + 2 * keys)  # whose input needs no gradient
    moved = 2 * shape.hidden + 2 * query + 2 * keys + query + shape.hidden + 3 * shape.inner + shape.hidden

    def products(name: str, passes: float, count: float, less: int = 0) -> Part:
        flop = 2.0 * tokens * (count * weights - less)
        return Part(name, "products", flop * passes, passes * count * width * (weights + tokens * moved), 7 * count)

    parts = [
        products("products, forward", 1, forward),
        products("products, backward", 1, backward, into_lowest),
    ]
    if low:  # the last product of a layer is not needed again
        parts.append(products("products, again", 1, backward, backward * shape.hidden * shape.inner))
    pairs = batch.pairs + tokens * adapter.prefix
    flop = 4.0 * query * pairs
    passes = forward + (adapted if low else 0)
    around = width * tokens * (2 * query + 2 * keys)
    prompts = 2.0 * adapter.prefix * shape.hidden * 2 * keys
    parts += [
        Part("attention, forward", "attention", passes * flop, passes * around, 2 * passes),
        Part("attention, backward", "attention", adapted * BACKWARD_OVER_FORWARD * flop, adapted * 2 * around, 7 * adapted),
        Part("prompts", "products", (3 if low else 2) * adapted * prompts,
             (3 if low else 2) * adapted * width * 2 * shape.hidden * keys, 8 * adapted),
    ]  # fmt: skip
    kind = "fused" if fused else "separate"
    scale = width / 2
    kernels = 1 if fused else 6
    parts += [
        Part(
            name, "memory", 0.0, scale * elements * (passes * per[0] + adapted * per[1]),
            each * kernels * (passes + 2 * adapted),
        )
        for name, elements, per, each in (
            ("norms", 2 * tokens * shape.hidden, _NORM[kind], 2),
            ("rotations", tokens * (query + keys), _ROTATION[kind], 1.5),
            ("activations", tokens * shape.inner, _ACTIVATION[kind], 0.4),
            ("residuals", 2 * tokens * shape.hidden, _RESIDUAL, 0.4),
        )
    ]  # fmt: skip
    logits = batch.responses * shape.vocabulary
    head = shape.hidden * shape.vocabulary
    parts += [
        Part(
            "head", "products", 4.0 * logits * shape.hidden, width * 2 * (head + 2 * batch.responses * shape.hidden), 20
        ),
        Part("cross entropy", "memory", 0.0, logits * (2 * width + 7 * 4), 30),
    ]
    return parts


def optimizer_part(parameters: int) -> Part:
    """AdamW on float32 parameters: weight, gradient and two moments read, weight and moments written."""
    return Part("optimizer", "memory", 0.0, 4.0 * 7 * parameters, 10)


def adapter_parameters(shape: ModelShape, adapter: Adapter) -> int:
    """Prompts, and a gate for each head."""
    return adapter.layers * (adapter.prefix * shape.hidden + shape.heads)
