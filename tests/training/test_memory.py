"""The model of a step's memory, beside what autograd really keeps."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import llama_adapter_kernels as lak
from llama_adapter_kernels.training.loss import response_loss
from llama_adapter_kernels.training.memory import MOST_TOKENS, activation_bytes, fitting_tokens, keep_words_frozen
from llama_adapter_kernels.training.packing import pack
from llama_adapter_kernels.training.tokens import Example

CONFIG = LlamaConfig(vocab_size=96, hidden_size=192, intermediate_size=512, num_hidden_layers=6, num_attention_heads=6,
                     num_key_value_heads=2)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_forward_pass_keeps_what_the_model_says(dtype: torch.dtype) -> None:
    model = LlamaForCausalLM(CONFIG).to(dtype)
    lak.attach_adapter(model, lak.AdapterConfig(num_layers=4))
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in own:
            kept[address] = tensor
        return tensor

    batch = pack([Example(tuple(3 + (7 * i) % 90 for i in range(256)), 128)] * 4)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        response_loss(model, batch)
    measured = sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / 1024
    assert activation_bytes(model.config, 4, dtype.itemsize) == pytest.approx(measured, rel=0.02)
    assert activation_bytes(model.config, 4, dtype.itemsize, low=True) < 0.5 * measured


def test_what_fits_follows_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    model, cpu = LlamaForCausalLM(CONFIG), torch.device("cpu")
    free = 100 * activation_bytes(CONFIG, 4, 4)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": free})())
    assert fitting_tokens(model, 4, cpu) == 60
    assert fitting_tokens(model, 2, cpu) == 120
    assert fitting_tokens(model, 4, cpu, low=True) > 120
    free = 10**12
    assert fitting_tokens(model, 4, cpu) == MOST_TOKENS["cpu"]


def test_layers_below_the_adapter_are_computed_once_where_activations_are_computed_again() -> None:
    """transformers lets embedded words require gradients then, which would run every layer three times."""
    model = LlamaForCausalLM(CONFIG).train()
    lak.attach_adapter(model, lak.AdapterConfig(num_layers=2))
    calls: dict[int, int] = {}
    for number, layer in enumerate(model.model.layers):
        layer.mlp.act_fn.register_forward_hook(
            lambda *_, number=number: calls.update({number: calls.get(number, 0) + 1})
        )
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable()
    else:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    keep_words_frozen(model)
    batch = pack([Example(tuple(range(3, 40)), 8)])
    calls.clear()
    response_loss(model, batch)[0].backward()
    # One more forward pass finds out how the head is to be used.
    assert calls == {0: 3, 1: 3, 2: 3, 3: 3, 4: 4, 5: 4}
