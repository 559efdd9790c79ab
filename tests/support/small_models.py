"""Small random transformers models, with and without an adapter whose gates are open."""

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

import llama_adapter_kernels as lak

SHAPE = {
    "vocab_size": 96, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**SHAPE),
    "llama multi-head with biases": LlamaConfig(**SHAPE | {"num_key_value_heads": 4}, attention_bias=True),
    "llama head_dim 20": LlamaConfig(**SHAPE, head_dim=20),
    "mistral": MistralConfig(**SHAPE, sliding_window=None),
    "mistral sliding window": MistralConfig(**SHAPE, sliding_window=5),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen2 sliding layers": Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=4, max_window_layers=1),
    "qwen3": Qwen3Config(**SHAPE, head_dim=16),
}
TOKENS = torch.arange(3, 25).repeat(2, 1)


def build(name: str = "llama", dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name], dtype=dtype, attn_implementation="sdpa").eval()
    for parameter in model.parameters():  # biases start at zero: make them count
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def adapted(name: str = "llama", opened: float = 0.7, **config: object) -> tuple[nn.Module, lak.ZeroGateAdapter]:
    model = build(name)
    adapter = lak.attach_adapter(model, lak.AdapterConfig(prefix_length=4, **config))
    with torch.no_grad():
        for layer in adapter.layers.values():
            layer.gate.fill_(opened)
    return model, adapter
