"""Shared by all tests: one thread per worker, seeds, no GPU tests without a GPU."""

import os
from types import ModuleType

import pytest
import torch

from tests.support.emulator import load_emulator

# Tests run side by side, one per core: threads of one test would only wait for those of another. Tests that are about
# threads set their own number.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def emulator() -> ModuleType:
    """The CUDA sources compiled for the emulator, built once for all test workers."""
    return load_emulator()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and this machine has none"))
