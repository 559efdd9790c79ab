"""Small models with PEFT's AdaptionPrompt, gates open."""

import copy
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MistralConfig

from tests.support.small_models import SHAPE

GPT2 = {
    "vocab_size": 96, "n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 128, "attn_pdrop": 0.0, "resid_pdrop": 0.0,
    "embd_pdrop": 0.0, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**SHAPE),
    "llama with biases": LlamaConfig(**SHAPE, attention_bias=True),  # that of the output projection counts twice
    "mistral": MistralConfig(**SHAPE, sliding_window=None),
    "mistral sliding window": MistralConfig(**SHAPE, sliding_window=5),
    "gpt2": GPT2Config(**GPT2),
    "gpt2 scaled by layer": GPT2Config(**GPT2, scale_attn_by_inverse_layer_idx=True),
}


def base_model(name: str = "llama", dtype: torch.dtype = torch.float32) -> nn.Module:
    """Random weights; whatever starts at zero or one is something else."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]), attn_implementation="sdpa").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.to(dtype)


def prompted(name: str = "llama", dtype: torch.dtype = torch.float32, layers: int = 2) -> Any:
    """PEFT's AdaptionPrompt in the last `layers` layers."""
    from peft import AdaptionPromptConfig, get_peft_model

    config = AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=4, adapter_layers=layers)
    model = get_peft_model(base_model(name, dtype), config).eval()
    open_gates(model, 1)
    return model


def open_gates(model: nn.Module, seed: int) -> None:
    """Random gates and prompts in the adapter that is active."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "adaption_" in name:
                parameter.copy_(torch.randn(parameter.shape) + 0.5)
