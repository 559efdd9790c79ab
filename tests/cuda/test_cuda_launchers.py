"""What the C interface refuses, and how it says so. The same interface.cu is in the CUDA library and in the emulator."""

import ctypes
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
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


@pytest.fixture
def device(emulator: ModuleType) -> Iterator[Callable[..., None]]:
    """Says what the emulated device is and how its calls fail."""
    yield emulator.set_device
    emulator.set_device()


DEVICES = [  # what the device says, the sentence, whether it may say otherwise later
    ({"capability": 75}, "needs a GPU of compute capability 8.0 or later", False),
    ({"driver_error": 35}, r"driver is too old .* NVIDIA driver 580 or later \(built with CUDA 13.0;", False),
    (
        {"code_error": 222},
        "driver is too old .* needs the driver released with that CUDA",
        False,
    ),  # PTX newer than the driver
    ({"code_error": 209}, "has no code for this GPU; compiled for compute capability emulated", False),
    ({"code_error": 2}, "the GPU's memory does not suffice", True),
    ({"driver_error": 100}, "emulated", True),
]


@pytest.mark.parametrize(("says", "message", "can_change"), DEVICES)
def test_why_a_device_cannot_run_the_kernels(
    emulator: ModuleType, device: Callable[..., None], says: dict[str, int], message: str, can_change: bool
) -> None:
    device(**says)
    code, later = emulator.probe()
    assert re.search(message, emulator.error(code))
    assert later == can_change
    assert re.search(message, refusal(emulator, "forward"))


@pytest.mark.parametrize("capability", [80, 86, 90, 120])
def test_devices_that_can(emulator: ModuleType, device: Callable[..., None], capability: int) -> None:
    device(capability=capability)
    assert emulator.probe() == (0, False)


def test_kernels_are_listed_by_family(emulator: ModuleType) -> None:
    lines = emulator.kernels().splitlines()
    assert {line.split()[0] for line in lines} == {"sm80"}
    assert {len(line.split()) for line in lines} == {9}


@pytest.mark.skipif(not cuda_library.LIBRARY.exists(), reason="the CUDA library is not built: no nvcc, or LAK_CUDA=0")
def test_a_device_without_code_is_told_what_is_built() -> None:
    library = ctypes.CDLL(str(cuda_library.LIBRARY))
    library.lak_cuda_error.restype = ctypes.c_char_p
    text = next(t for t in (library.lak_cuda_error(code).decode() for code in range(20)) if "no code for" in t)
    assert text.endswith("compute capability 80 86 89 90")
    assert "\n" not in text
    assert library.lak_cuda_error(1000 + 2).decode() == "out of memory"  # cudaErrorMemoryAllocation


def test_nothing_to_decode_needs_no_workspace(emulator: ModuleType) -> None:
    run = EmulatedProblem(emulator, make_problem(SMALL, torch.bfloat16))
    run._view("output", torch.empty_like(run.query), writable=True)
    assert emulator.decode(run.params | {"batch": 0}) == 0
    assert emulator.decode(run.params) != 0


FAILING = {  # of each pass the case, and how many launches it takes
    "forward": (SMALL, 1),
    "forward, packed": (replace(SMALL, lengths=((3, 3), (4, 4)), prefix="table"), 2),
    "backward": (replace(SMALL, prefix_length=33), 5),
    "backward, packed": (replace(SMALL, lengths=((3, 3), (4, 4)), prefix="table"), 4),
    "backward, long": (replace(SMALL, seq_k=800), 4),
    "decode": (replace(SMALL, seq_k=600), 2),
}


@pytest.mark.parametrize("name", list(FAILING))
def test_a_launch_that_fails(emulator: ModuleType, device: Callable[..., None], name: str) -> None:
    """Whichever of them it is: the pass ends there, with its error."""
    case, launches = FAILING[name]
    run = EmulatedProblem(emulator, make_problem(case, torch.bfloat16))  # type: ignore[arg-type]
    run.forward()
    function = getattr(run, name.split(",")[0])
    for working in range(launches):
        device(launches=working)
        emulator.blocks()
        with pytest.raises(AssertionError, match="memory does not suffice"):
            function()
        assert len(emulator.blocks()) <= working
    device(launches=launches)
    function()
