"""Adapter files as other projects write them, with random open gates, and importing them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import llama_adapter_kernels as lak
from tests.support.eager_llama import HEADS, HIDDEN, LAYERS

PROMPTS = 5


@contextmanager
def imported(model: nn.Module, path: Path, **choices: Any) -> Iterator[lak.ZeroGateAdapter]:
    """The adapter of a file on the model."""
    adapter = lak.load_adapter(model, path, **choices)
    try:
        yield adapter
    finally:
        lak.detach_adapter(model)


def v1_file(adapted: int = 2) -> dict[str, Tensor]:
    """Official V1: prompts of the last layers, gates of all, those without prompts still 0."""
    torch.manual_seed(1)
    gates = {
        f"layers.{n}.attention.gate": torch.randn(1, HEADS, 1, 1) * (n >= LAYERS - adapted) for n in range(LAYERS)
    }  # fmt: skip
    return gates | {"adapter_query.weight": torch.randn(adapted * PROMPTS, HIDDEN)}
