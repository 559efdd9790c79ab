"""Runs the CPU kernels with an instruction set of the test's choice."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from llama_adapter_kernels.ops import registration

USABLE = registration.cpu_instruction_sets()[0]


@contextmanager
def forced(name: str) -> Iterator[None]:
    """Every operation that begins inside uses the instruction set of this name, in all threads."""
    torch.ops.llama_adapter_kernels.force_cpu_instruction_set(name)
    try:
        assert torch.ops.llama_adapter_kernels.cpu_instruction_set() == name
        yield
    finally:
        torch.ops.llama_adapter_kernels.force_cpu_instruction_set("")
