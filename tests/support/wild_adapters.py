"""Adapter files as other projects write them, with random open gates, and importing them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

import llama_adapter_kernels as lak
from llama_adapter_kernels.formats.reading import Choices
from llama_adapter_kernels.formats.registry import read_adapter
from tests.support.eager_llama import HEADS, HIDDEN, LAYERS

PROMPTS = 5


@contextmanager
def imported(model: nn.Module, path: Path, format: str = "auto", **choices: object) -> Iterator[tuple[str, ...]]:
    """The adapter of a file on the model; yields its reader's notes."""
    reading = read_adapter(path, format, Choices(**choices))
    adapter = lak.attach_adapter(model, reading.state.config)
    adapter.load_tensors(reading.state, str(path))
    try:
        yield reading.notes
    finally:
        lak.detach_adapter(model)


def v1_file(adapted: int = 2) -> dict[str, Tensor]:
    """Official V1: prompts of the last layers, gates of all, those without prompts still 0."""
    torch.manual_seed(1)
    gates = {
        f"layers.{n}.attention.gate": torch.randn(1, HEADS, 1, 1) * (n >= LAYERS - adapted) for n in range(LAYERS)
    }  # fmt: skip
    return gates | {"adapter_query.weight": torch.randn(adapted * PROMPTS, HIDDEN)}
