"""Small models with PEFT's AdaptionPrompt or with this package's method of PEFT, gates open."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MistralConfig

import llama_adapter_kernels as lak
from tests.support.small_models import SHAPE, TOKENS

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


CONFIG: dict[str, Any] = {"prefix_length": 4, "num_layers": 2, "task_type": "CAUSAL_LM"}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "scalar gates of two layers": ("mistral sliding window", {"num_layers": None, "layers": [0, 2], "gate_shape": "scalar"}),
    "gpt2": ("gpt2", {"gate": "identity"}),
    "tuned": ("llama", {"tuning": lak.Tuning(lora_rank=2)}),
}  # fmt: skip


def wrapped(kind: str = "llama", dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    """A model with this package's method of PEFT, its gates open."""
    from peft import get_peft_model

    name, changes = KINDS[kind]
    model = get_peft_model(base_model(name, dtype), lak.ZeroGateConfig(**CONFIG | changes | more)).eval()
    opened(model, 1)
    return model


def opened(model: nn.Module, seed: int, name: str = "default") -> None:
    """Random gates, prompts and whatever is tuned."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in lak.attached_adapters(model)[name].parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.5)


def logits(model: Any, tokens: Tensor = TOKENS, **more: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens, **more).logits


def two_adapters(kind: str = "llama") -> Any:
    """The same with a second adapter, "other"."""
    model = wrapped(kind)
    model.add_adapter("other", lak.ZeroGateConfig(**CONFIG | KINDS[kind][1] | {"prefix_length": 3}))
    opened(model, 2, "other")
    return model
