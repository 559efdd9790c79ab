"""A model of a few thousand random weights with the demo's tokenizer, as a Hugging Face folder."""

import shutil
from pathlib import Path

import torch

ASSETS = Path(__file__).parents[2] / "llama_adapter_kernels" / "demo" / "assets" / "base"


def save_tiny_model(folder: Path, intermediate_size: int = 96) -> Path:
    """Fills `folder`: Llama, 3 layers, grouped queries, random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=64,
        intermediate_size=intermediate_size,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,  # attention that differs from token to token
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(ASSETS / name, folder)
    return folder
