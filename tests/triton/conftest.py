"""Runs checks in Triton's interpreter, in one child process per test worker.

Whether kernels are interpreted is decided when Triton is imported, for the whole process. Other tests of the same run
may want them compiled (on a GPU, or ahead of time), so this process never sets TRITON_INTERPRET: a spawned child does.
"""

import os
from collections.abc import Iterator

import pytest
import torch

from tests.support.child_process import RunInChild, child_process


@pytest.fixture(scope="session")
def interpreted() -> Iterator[RunInChild]:
    """interpreted(function, *arguments): calls a module's function where kernels run in the interpreter."""
    yield from child_process(TRITON_INTERPRET="1")


@pytest.fixture(scope="session")
def compiled_here() -> Iterator[RunInChild]:
    """As `interpreted`, in a process that compiles kernels for cards that are not here."""
    yield from child_process(TRITON_INTERPRET="0")


@pytest.fixture
def cuda() -> torch.device:
    """A device that can run the compiled kernels."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("TRITON_INTERPRET=1: kernels would be interpreted, not run by the device")
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("the CUDA device is older than compute capability 8.0")
    return torch.device("cuda")
