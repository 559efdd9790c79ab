"""A model of a few thousand random weights with the demo's tokenizer, and some instruction rows."""

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.support.tiny_model import save_tiny_model


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
    return save_tiny_model(tmp_path_factory.mktemp("tiny-model"))


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
