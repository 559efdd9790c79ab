"""The kernels for CPUs with bfloat16 dot products or AMX, on a CPU without them.

The library is built once more with these instructions replaced by their definitions (csrc/cpu/pairs.h, csrc/cpu/amx.h), and
the tests of the CPU kernels run on it in a process of their own.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

from tests.support.instruction_sets import USABLE

ROOT = Path(__file__).parents[2]
FILES = [f"tests/cpu/test_{name}.py" for name in ("attention_cpu", "scales", "special_values")]
BUILD = ROOT / "build" / "bf16_stand_in"

# What the stand-in process runs first: the builds round differently, so equal bits would mean that one was not used.
DIFFERS = """
import torch
import llama_adapter_kernels as lak
torch.manual_seed(0)
q, k, v = (torch.randn(1, 4, 310, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
results = []
for isa in ("baseline", "avx512_bf16", "amx_bf16"):
    torch.ops.llama_adapter_kernels.force_cpu_instruction_set(isa)
    output = lak.zero_gate_attention(q, k, v, None, None, None, is_causal=True, backend="cpu")
    results.append([output, *torch.autograd.grad(output.float().square().sum(), (q, k, v))])
for plain, in_pairs, in_tiles in zip(*results):
    assert not torch.equal(plain, in_pairs) and not torch.equal(plain, in_tiles)
    torch.testing.assert_close(plain, in_pairs, atol=0.1, rtol=0.05)
    torch.testing.assert_close(plain, in_tiles, atol=0.1, rtol=0.05)
assert not all(map(torch.equal, results[1], results[2]))
print(lak.__file__)
"""


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    """A process with this environment imports the package with the stand-in library."""
    vectors = [isa for isa in ("avx512", "avx2") if isa in USABLE]
    if not vectors:
        pytest.skip("this CPU has neither AVX-512 nor AVX2, one of which the stand-in is made of")
    tools = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PATH": tools}
    environment.pop("LAK_CPU_ISA", None)
    options = [f"-DLAK_BF16_STAND_IN={vectors[0]}", "-DLAK_CUDA=0", f"-DLAK_TORCH_INCLUDE={include_paths()[0]}"]
    for command in (["cmake", "-S", ROOT, "-B", BUILD, "-G", "Ninja", *options], ["cmake", "--build", BUILD]):
        result = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
    site = BUILD / "site"
    shutil.rmtree(site, ignore_errors=True)
    # With the tests beside it: pytest puts the folder of its configuration before PYTHONPATH.
    for folder in ("llama_adapter_kernels", "tests"):
        shutil.copytree(ROOT / folder, site / folder)
    shutil.copy(ROOT / "pyproject.toml", site)
    library = "libllama_adapter_kernels.so"
    shutil.copy(BUILD / library, site / "llama_adapter_kernels" / library)
    return environment | {"PYTHONPATH": str(site)}


def run(environment: dict[str, str], *arguments: str) -> str:
    # -P: the folder this is started in does not come before PYTHONPATH.
    command = [sys.executable, "-P", *arguments]
    result = subprocess.run(command, env=environment, cwd=BUILD / "site", capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_pairs_and_tiles_are_used(environment: dict[str, str]) -> None:
    assert str(BUILD) in run(environment, "-c", DIFFERS)


@pytest.mark.parametrize("isa", ["avx512_bf16", "amx_bf16"])
def test_bfloat16(environment: dict[str, str], isa: str) -> None:
    arguments = ["-p", "no:cacheprovider", "-p", "no:xdist", "-k", f"{isa} and bfloat16"]
    report = run(environment, "-m", "pytest", "-q", *arguments, *FILES)
    passed = int(report.rsplit(" passed", 1)[0].split()[-1])
    assert passed >= 20, report
