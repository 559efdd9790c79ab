"""Bytes of device memory in a training step, by their purpose.

Activations are those that autograd keeps from the forward pass for the backward pass; `tests/planning` compares them with
what it does keep. A frozen linear layer keeps nothing of its input, layers below the lowest adapted one keep nothing at all.
"""

from llama_adapter_kernels.planning.operations import Adapter, Batch, adapter_parameters
from llama_adapter_kernels.planning.shapes import ModelShape

GPU_CHUNK = 256 << 20  # logits of a chunk in float32, see training/loss.py


def kept_activations(
    shape: ModelShape, adapter: Adapter, batch: Batch, *, width: int = 2, fused: bool = False, low: bool = False
) -> dict[str, float]:
    """Bytes kept for the backward pass by kind; `low`: inputs of layers, and all of one layer at a time."""
    tokens, adapted = batch.tokens, adapter.layers
    query, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    norm = tokens * (shape.hidden * (width if fused else 4) + 4)  # input in float32 (or as it is), and its scale
    attention = tokens * (2 * width * (query + keys) + 4 * shape.heads) + 2 * width * adapter.prefix * keys
    inner = tokens * width * shape.inner * (2 if fused else 3)
    layers = 1 if low else adapted
    kept = {
        "norms": (2 * layers - 1) * norm
        + norm,  # the lowest adapted layer's first has no gradient, the last of all has
        "attention": layers * attention,
        "feed-forward": layers * inner,
        "rotations": 2 * tokens * width * shape.head_dim,
        "head": batch.responses * width * shape.hidden,
    }
    if low:
        kept["inputs of layers"] = adapted * tokens * width * shape.hidden
    return kept


def step_memory(
    shape: ModelShape, adapter: Adapter, batch: Batch, *, width: int = 2, fused: bool = False, low: bool = False,
    chunk: int = GPU_CHUNK,
) -> dict[str, float]:  # fmt: skip
    """Bytes at the peak by part: weights, adapter, optimizer, activations by kind, workspace."""
    trained = 4.0 * adapter_parameters(shape, adapter)
    rows = min(batch.responses, chunk // (4 * shape.vocabulary))
    logits = rows * shape.vocabulary * (4 if width == 4 else 4 + width)
    # In the backward pass of a layer: gradients of the feed-forward part, whose activations are there still.
    temporaries = 3 * batch.tokens * width * shape.inner
    activations = kept_activations(shape, adapter, batch, width=width, fused=fused, low=low)
    return {
        "weights": float(width * shape.parameters),
        "adapter and gradient": 2 * trained,
        "optimizer": 2 * trained,
        **{f"activations: {name}": size for name, size in activations.items()},
        "workspace": max(logits, temporaries),  # not at the same time: logits are gone when the backward pass begins
    }
