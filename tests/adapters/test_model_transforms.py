"""torch.func over a model with an adapter: per-example gradients, as for differential privacy or influence functions."""

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap
from transformers import LlamaConfig, LlamaForCausalLM

import llama_adapter_kernels as lak


def test_per_example_gradients_of_the_adapter() -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attn_implementation="sdpa",
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    lak.attach_adapter(model, lak.AdapterConfig(prefix_length=3, num_layers=2))
    ids = torch.randint(0, 64, (3, 10))
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    parameters = {name: torch.randn_like(p) for name, p in parameters.items()}
    assert len(parameters) == 4

    def loss(values: dict[str, Tensor], text: Tensor) -> Tensor:
        output = functional_call(model, values, (), {"input_ids": text[None], "use_cache": False})
        return output.logits.square().mean()

    together = vmap(grad(loss), in_dims=(None, 0))(parameters, ids)
    for example, text in enumerate(ids):
        leaves = {name: value.clone().requires_grad_() for name, value in parameters.items()}
        loss(leaves, text).backward()
        for name, leaf in leaves.items():
            assert leaf.grad is not None and leaf.grad.abs().sum() > 0
            torch.testing.assert_close(together[name][example], leaf.grad, atol=1e-5, rtol=1e-4)
