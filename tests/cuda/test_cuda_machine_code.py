"""The CUDA library as built: registers, local memory, shared memory and instructions of its kernels. No GPU needed."""

import re
import subprocess

import pytest
import torch

from llama_adapter_kernels.ops import cuda_library
from llama_adapter_kernels.ops.cuda_library import Kernel

pytestmark = pytest.mark.skipif(
    not cuda_library.LIBRARY.exists(), reason="the CUDA library is not built: no nvcc at installation, or LAK_CUDA=0"
)

# Shared memory of a multiprocessor in KiB; 1 KiB of it goes to the system for every block.
SHARED_KIB = {"sm_80": 164, "sm_86": 100, "sm_89": 100, "sm_90": 228}
REGISTERS = 65536
TUNED = ("forward", "forward_small", "forward_masked", "backward_rows", "backward_words", "backward_keys",
         "backward_keys_small", "decode")  # fmt: skip
# Bytes a thread of what does not change in the loop, read again from local memory a few times a tile: the alternative is one
# block a multiprocessor instead of two.
SPILLED = {("backward_words", 128): 16}
WIDE = "backward_keys"  # needs more shared memory than 8.6 and 8.9 have: there backward_keys_small runs


def is_tuned(kernel: Kernel) -> bool:
    return kernel.dtype != "float32" and kernel.head_dim <= 128


@pytest.fixture(scope="module")
def kernels() -> list[Kernel]:
    return cuda_library.kernels()


def test_architectures() -> None:
    assert cuda_library.architectures() == list(SHARED_KIB)
    listed = subprocess.run(
        [str(cuda_library.cuobjdump()), "--list-ptx", str(cuda_library.LIBRARY)],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert "sm_90.ptx" in listed  # for cards later than the newest architecture


@pytest.mark.parametrize("architecture", SHARED_KIB)
def test_registers_and_shared_memory(kernels: list[Kernel], architecture: str) -> None:
    functions = cuda_library.usage()[architecture]
    assert {kernel.name for kernel in kernels if is_tuned(kernel)} == set(TUNED)
    for kernel in kernels:
        if kernel.name == WIDE and SHARED_KIB[architecture] == 100:
            continue
        usage = cuda_library.usage_of(kernel, functions)
        blocks = kernel.blocks
        if architecture in ("sm_86", "sm_89") and (kernel.shared / 1024 + 1) * blocks > SHARED_KIB[architecture]:
            blocks = 1  # these cards have room for one such block
        # Registers are given out to warps in units of 256.
        warp_registers = (usage.registers * 32 + 255) // 256 * 256
        assert warp_registers * (kernel.threads // 32) * blocks <= REGISTERS, (kernel, usage)
        assert (kernel.shared / 1024 + 1) * blocks <= SHARED_KIB[architecture], kernel
        assert kernel.shared <= (163 if kernel.name == WIDE else 99) * 1024, kernel
        if is_tuned(kernel):
            assert usage.stack <= SPILLED.get((kernel.name, kernel.head_dim), 0), (kernel, usage)


def disassembly(kernel: Kernel, architecture: str) -> str:
    functions = cuda_library.usage()[architecture]
    (name,) = (name for name in functions if name.startswith(kernel.symbol))
    command = [cuda_library.cuobjdump(), "-sass", "-arch", architecture, "-fun", name, cuda_library.LIBRARY]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True).stdout


def count(code: str, instruction: str) -> int:
    return len(re.findall(rf"\b{instruction}\b", code))


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize("name", ["forward", "backward_rows", "backward_words", "backward_keys", "decode"])
def test_instructions_of_tuned_kernels(kernels: list[Kernel], name: str, architecture: str) -> None:
    """Products on tensor cores, operands by ldmatrix, tiles by 16-byte asynchronous copies, nothing in local memory."""
    (kernel,) = (k for k in kernels if (k.name, k.dtype, k.head_dim) == (name, "bfloat16", 128))
    code = disassembly(kernel, architecture)
    # In the text of the kernel, where decode's products stay a loop over head_dim.
    assert count(code, r"HMMA\.16816\.F32\.BF16") >= (16 if name == "decode" else 32)
    assert count(code, r"LDSM\.16(?:\.M|\.MT)88\.4") >= (8 if name == "decode" else 16)
    assert count(code, r"LDGSTS\.E\.(?:BYPASS\.)?(?:LTC128B\.)?128") >= 8
    assert count(code, r"MUFU\.EX2") >= 8
    assert count(code, r"(?:LDL|STL)(?:\.\w+)*") <= (12 if (name, 128) in SPILLED else 0)
    assert count(code, r"REDG?\.E\.ADD\.F32\S*") >= (32 if name == "backward_keys" else 0)


def loop_over_keys(code: str, products: int) -> list[tuple[str, list[int]]]:
    """(instruction, numbers of its registers) of the shortest loop with so many products."""
    found = re.findall(r"/\*([0-9a-f]{4,5})\*/ +(?:@!?U?P\d+ +)?([A-Z0-9_.]+)([^;]*);", code)
    at = {int(address, 16): i for i, (address, _, _) in enumerate(found)}
    loops = []
    for i, (address, name, operands) in enumerate(found):
        target = re.search(r"0x([0-9a-f]+)", operands) if name.startswith("BRA") else None
        if target and int(target[1], 16) < int(address, 16):
            loops.append(found[at[int(target[1], 16)] : i])
    body = min((loop for loop in loops if sum(name.startswith("HMMA") for _, name, _ in loop) >= products), key=len)
    return [(name, [int(r) for r in re.findall(r"\bR(\d+)", operands)]) for _, name, operands in body]


def products_before_use(body: list[tuple[str, list[int]]]) -> list[int]:
    """For every ldmatrix of a loop: how many products are issued between it and the first one that needs what it loads."""
    distances, products = [], 0
    loaded: dict[int, tuple[int, int]] = {}  # register -> (the load, products issued before it)
    for round_ in range(2):  # what the end of the loop loads, its beginning uses
        for i, (name, registers) in enumerate(body):
            if name.startswith("LDSM"):
                for register in range(registers[0], registers[0] + 4):
                    if round_ == 0:
                        loaded[register] = (i, products)
                    else:
                        loaded.pop(register, None)
            elif name.startswith("HMMA"):
                _, a, b = registers[:3]
                used = {loaded[r] for r in (*range(a, a + 4), b, b + 1) if r in loaded}
                distances += [products - before for _, before in used]
                loaded = {r: load for r, load in loaded.items() if load not in used}
                products += 1
    return distances


@pytest.mark.parametrize("architecture", SHARED_KIB)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_operands_are_loaded_ahead(kernels: list[Kernel], head_dim: int, architecture: str) -> None:
    """ldmatrix takes about as long as four products of a warp, and the compiler puts so many between it and its use, except
    for those with which a run of products begins."""
    (kernel,) = (k for k in kernels if (k.name, k.dtype, k.head_dim) == ("forward", "bfloat16", head_dim))
    distances = products_before_use(loop_over_keys(disassembly(kernel, architecture), head_dim))
    assert len(distances) >= head_dim // 4
    assert sorted(distances)[len(distances) // 2] >= 8, distances
    assert sum(distance < 4 for distance in distances) <= len(distances) / 5, distances


def test_float32_is_not_rounded(kernels: list[Kernel]) -> None:
    (kernel,) = (k for k in kernels if (k.name, k.dtype, k.head_dim) == ("forward_masked", "float32", 64))
    code = disassembly(kernel, "sm_80")
    assert count(code, "FFMA") > 500
    assert count(code, r"HMMA\S*") == 0


def test_registers_the_ops() -> None:
    torch.ops.load_library(cuda_library.LIBRARY)
    for op in ("forward", "backward", "decode"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"llama_adapter_kernels::{op}", "CUDA")
