"""The package with libraries that are missing or broken: one sentence says which, and the other backends work."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import llama_adapter_kernels

PACKAGE = Path(llama_adapter_kernels.__file__).parent

CODE = """
import torch, warnings
import llama_adapter_kernels as lak
from llama_adapter_kernels.ops import backends
print("available:", *lak.available_backends("cpu"))
print("reason:", backends.unavailable_reason("cpu", "cpu"))
q = torch.randn(1, 1, 2, 8)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    lak.zero_gate_attention(q, q, q, None, None, None)
print("warned:", *(str(warning.message) for warning in caught))
print("triton op:", torch.ops.llama_adapter_kernels_triton.forward.default._schema.name)
"""


def said(site: Path) -> dict[str, str]:
    environment = os.environ | {"PYTHONPATH": str(site)}
    run = subprocess.run([sys.executable, "-c", CODE], cwd=site, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return dict(line.split(": ", 1) for line in run.stdout.splitlines())


@pytest.mark.parametrize("what", ["missing", "cut off", "text"])
def test_without_the_cpu_library(tmp_path: Path, what: str) -> None:
    copy = tmp_path / PACKAGE.name
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("*.so", "__pycache__", "demo", "bench"))
    library = "libllama_adapter_kernels.so"
    if what == "cut off":  # as an interrupted copy leaves it: the dynamic linker would die of a bus error
        (copy / library).write_bytes((PACKAGE / library).read_bytes()[:-100])
    elif what == "text":  # a pointer file of Git LFS
        (copy / library).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 2323984\n")
    lines = said(tmp_path)
    assert lines["available"] == "reference"
    expected = (
        "libllama_adapter_kernels.so is not built" if what == "missing" else "libllama_adapter_kernels.so does not load"
    )
    assert lines["reason"].startswith(expected)
    assert lines["warned"].startswith("no backend fits") and expected in lines["warned"]
    assert lines["triton op"] == "llama_adapter_kernels_triton::forward"
