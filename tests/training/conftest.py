"""A model of a few thousand random weights with the demo's tokenizer, and some instruction rows."""

import json
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ASSETS = Path(__file__).parents[2] / "llama_adapter_kernels" / "demo" / "assets" / "base"


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny models: more threads only wait for each other, most of all beside other tests. Processes inherit it."""
    before, threads = os.environ.get("OMP_NUM_THREADS"), torch.get_num_threads()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    if before is None:
        del os.environ["OMP_NUM_THREADS"]
    else:
        os.environ["OMP_NUM_THREADS"] = before


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder: Llama, 3 layers, grouped queries, random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny-model")
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=64,
        intermediate_size=96,
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


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """22 Alpaca rows of different lengths, half of them with input."""
    chance = random.Random(5)
    words = [
        "read",
        "write",
        "file",
        "socket",
        "return",
        "value",
        "list",
        "of",
        "the",
        "open",
        "close",
        "error",
        "path",
        "name",
    ]
    rows = [
        {
            "instruction": "Describe " + " ".join(chance.choices(words, k=chance.randint(1, 8))),
            "input": " ".join(chance.choices(words, k=3)) if number % 2 else "",
            "output": " ".join(chance.choices(words, k=chance.randint(1, 12))) + ".",
        }
        for number in range(22)
    ]
    path = tmp_path_factory.mktemp("rows") / "rows.json"
    path.write_text(json.dumps(rows))
    return path
