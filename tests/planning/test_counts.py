"""What the plan counts is what torch counts: products to the operation, kept activations by autograd's own hooks."""

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

import llama_adapter_kernels as lak
from llama_adapter_kernels.planning.memory import kept_activations, step_memory
from llama_adapter_kernels.planning.operations import Adapter, Batch, adapter_parameters, step_parts
from llama_adapter_kernels.planning.shapes import ModelShape, shape_of
from llama_adapter_kernels.training.loss import response_loss, separate_head
from llama_adapter_kernels.training.memory import keep_words_frozen
from llama_adapter_kernels.training.packing import pack
from llama_adapter_kernels.training.tokens import Example

LENGTHS, PROMPT = (40, 71, 23, 58), 9
SIZES = {
    "vocab_size": 90, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 5, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
ADAPTED, PREFIX = 3, 6


def model_of(dtype: torch.dtype, low: bool, **more: Any) -> tuple[nn.Module, lak.ZeroGateAdapter, ModelShape]:
    sizes = SIZES | more
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=128, use_cache=False)).to(dtype).train()
    adapter = lak.attach_adapter(model, lak.AdapterConfig(prefix_length=PREFIX, num_layers=ADAPTED))
    if low:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        keep_words_frozen(model)
    separate_head(model)  # runs the model once, to know
    return model, adapter, shape_of(sizes, "tiny")


def packed() -> tuple[dict[str, Any], Batch]:
    examples = [Example(tuple(range(3, 3 + length)), PROMPT) for length in LENGTHS]
    return pack(examples), Batch.packed(LENGTHS, sum(length - PROMPT for length in LENGTHS))


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("more", [{}, {"num_key_value_heads": 4, "tie_word_embeddings": True}, {"head_dim": 24}])
def test_products_are_counted_exactly(more: dict[str, Any], low: bool) -> None:
    """The attention is this package's operation, which torch's counter does not know."""
    model, _, shape = model_of(torch.float32, low, **more)
    batch, counted = packed()
    with FlopCounterMode(display=False) as counter:
        response_loss(model, batch)[0].backward()
    parts = step_parts(shape, Adapter(ADAPTED, PREFIX), counted, low=low)
    ours = sum(part.flop for part in parts if part.kind == "products")
    assert counter.get_flop_counts()["Global"][torch.ops.aten.mm] == ours


def test_attention_is_counted_exactly() -> None:
    """Forward, by the definition, which multiplies all queries with all keys of their sequence."""
    model, _, shape = model_of(torch.float32, False)
    batch, counted = packed()
    dense = Batch(counted.tokens, sum(length**2 for length in LENGTHS), counted.responses)
    with FlopCounterMode(display=False) as counter, lak.use_backend("reference"):
        model(**{name: value for name, value in batch.items() if name != "labels"})
    parts = {part.name: part.flop for part in step_parts(shape, Adapter(ADAPTED, PREFIX), dense)}
    words = 4.0 * shape.heads * shape.head_dim * dense.pairs * shape.layers
    prefix = 4.0 * shape.heads * shape.head_dim * counted.tokens * PREFIX
    assert parts["attention, forward"] == words + prefix * shape.layers
    head = 2.0 * counted.tokens * shape.hidden * shape.vocabulary
    rest = parts["products, forward"] + parts["prompts"] / 2 + head
    assert counter.get_total_flops() == rest + words + prefix * ADAPTED


class Kept:
    """A tensor that autograd keeps, for as long as it does."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_activations_are_those_of_autograd(dtype: torch.dtype, low: bool) -> None:
    model, _, shape = model_of(dtype, low)
    batch, counted = packed()
    fixed = {
        tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers(), *_tensors(batch))
    }
    kept: weakref.WeakSet[Kept] = weakref.WeakSet()

    def keep(tensor: Tensor) -> Kept:
        found = Kept(tensor)
        kept.add(found)
        return found

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda found: found.tensor):
        loss, _ = response_loss(model, batch)
    storages = {found.tensor.untyped_storage().data_ptr(): found.tensor.untyped_storage().nbytes() for found in kept}
    parts, width = (shape, Adapter(ADAPTED, PREFIX), counted), dtype.itemsize
    expected = kept_activations(*parts, width=width, low=low)
    if low:  # one layer at a time has its activations in the backward pass, none has them after the forward pass
        assert expected["attention"] * ADAPTED == pytest.approx(kept_activations(*parts, width=width)["attention"])
        # Keyword arguments, as the rotations are, checkpoints keep without autograd.
        expected |= {
            "attention": 0.0,
            "feed-forward": 0.0,
            "rotations": 0.0,
            "norms": counted.tokens * (4 * shape.hidden + 4),
        }
    outside_of_hooks = expected.pop("head")  # the loss keeps its gradient by itself
    assert sum(size for where, size in storages.items() if where not in fixed) == pytest.approx(
        sum(expected.values()), rel=0.05
    )
    assert loss.grad_fn.gradient.nbytes == outside_of_hooks


def _tensors(batch: dict[str, Any]) -> list[Tensor]:
    return [value for value in batch.values() if isinstance(value, Tensor)]


@pytest.mark.parametrize("more", [{}, {"tie_word_embeddings": True}, {"head_dim": 24}])
def test_parameters(more: dict[str, Any]) -> None:
    model, adapter, shape = model_of(torch.float32, False, **more)
    trained = adapter.num_parameters()
    assert adapter_parameters(shape, Adapter(ADAPTED, PREFIX)) == trained
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters()) - trained
    memory = step_memory(shape, Adapter(ADAPTED, PREFIX), packed()[1], width=4)
    assert memory["weights"] == 4 * shape.parameters
    assert memory["adapter and gradient"] + memory["optimizer"] == 16 * trained
