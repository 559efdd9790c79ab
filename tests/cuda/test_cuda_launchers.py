"""What the launchers refuse, and how they say so. The same interface.cu is in the CUDA library and in the emulator."""

import ctypes
from types import ModuleType
from typing import Any

import pytest
import torch

from llama_adapter_kernels.ops import cuda_library
from llama_adapter_kernels.testing import Case, make_problem
from tests.support.emulated import EmulatedProblem

SMALL = Case(batch=1, heads_q=2, heads_kv=1, seq_q=4, seq_k=4, head_dim=64)


def refusal(emulator: ModuleType, function: str, **changes: Any) -> str:
    run = EmulatedProblem(emulator, make_problem(SMALL, torch.bfloat16))
    output = torch.empty_like(run.query)
    run._view("output", output, writable=True)
    run.params |= changes
    code = getattr(emulator, function)(run.params)
    return emulator.error(code)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": 3}, "query: expected float32, bfloat16 or float16"),
        ({"head_dim": 60}, "head_dim that is a multiple of 8 up to 256"),
        ({"head_dim": 264}, "head_dim that is a multiple of 8 up to 256"),
        ({"head_dim": 0}, "head_dim that is a multiple of 8 up to 256"),
        ({"batch": -1}, "sizes: expected from 0 to 2^30"),
        ({"seq_k": 2**31}, "sizes: expected from 0 to 2^30"),
        ({"total_k": 2**31}, "sizes: expected from 0 to 2^30"),
        ({"heads_kv": 3}, "a number of key heads that divides the query heads"),
        ({"heads_kv": 0}, "a number of key heads that divides the query heads"),
        ({"batch": 2**29, "heads_q": 64, "heads_kv": 64}, "exceed 2^31 - 1 thread blocks"),
    ],
)
@pytest.mark.parametrize("function", ["forward", "decode"])
def test_refused(emulator: ModuleType, function: str, changes: dict[str, Any], message: str) -> None:
    if function == "decode":
        changes = changes | {"workspace": torch.empty(1).data_ptr()}
    assert message in refusal(emulator, function, **changes)


@pytest.mark.parametrize("which", ["query", "key", "value", "prefix_key", "prefix_value"])
def test_misaligned(emulator: ModuleType, which: str) -> None:
    run = EmulatedProblem(emulator, make_problem(SMALL, torch.bfloat16))
    address, *strides = run.params[which]
    assert "multiples of 16 bytes" in refusal(emulator, "forward", **{which: [address + 2, *strides]})
    assert "multiples of 16 bytes" in refusal(emulator, "forward", **{which: [address, *strides[:-1], 66]})


@pytest.mark.parametrize("function", ["backward", "decode"])
def test_no_workspace(emulator: ModuleType, function: str) -> None:
    assert "workspace: expected memory, got none" in refusal(emulator, function)


@pytest.mark.skipif(not cuda_library.LIBRARY.exists(), reason="the CUDA library is not built: no nvcc, or LAK_CUDA=0")
def test_a_device_without_code_is_told_what_is_built() -> None:
    library = ctypes.CDLL(str(cuda_library.LIBRARY))
    library.lak_cuda_error.restype = ctypes.c_char_p
    text = next(t for t in (library.lak_cuda_error(code).decode() for code in range(20)) if "compiled code" in t)
    assert text.endswith("built architectures: 80 86 89 90")
    assert "\n" not in text
    assert library.lak_cuda_error(1000 + 2).decode() == "out of memory"  # cudaErrorMemoryAllocation
