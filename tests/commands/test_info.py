"""`llama-adapter info`: short, and true."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

import llama_adapter_kernels as lak
from llama_adapter_kernels.cli import app
from llama_adapter_kernels.ops import availability, backends, cuda_library


def printed(*options: str) -> str:
    result = CliRunner().invoke(app, ["info", *options])
    assert result.exit_code == 0, result.output
    return result.stdout


def said(text: str) -> dict[str, str]:
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line.startswith("  ")]
    return {name: rest for name, rest in lines if name in backends.BACKENDS}


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is built with CUDA")
def test_what_runs_here_fits_a_screen() -> None:
    text = printed()
    assert f"llama-adapter-kernels {lak.__version__}, torch {torch.__version__}" in text
    assert said(text).keys() == set(backends.BACKENDS)
    for backend, answer in said(text).items():
        reason = backends.unavailable_reason(backend, "cpu")
        assert answer == ("available" if reason is None else f"not available: {reason}")
    assert len(text.splitlines()) <= 16
    assert "registers" not in text
    if cuda_library.LIBRARY.exists():
        assert "NVIDIA driver 5" in text
        assert "not used: this torch is built without CUDA" in text


def test_a_card_that_does_not_work_is_said_and_not_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040). Please update")

    monkeypatch.setattr(availability, "_settled", {})
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda index: SimpleNamespace(name="A card", major=7, minor=0)
    )
    monkeypatch.setattr(torch.cuda, "init", fail)
    text = printed()
    assert "Backends on cuda:0, A card, compute capability 7.0:" in text
    assert said(text)["cuda"] == "not available: The NVIDIA driver on your system is too old (found version 11040)"


@pytest.mark.skipif(not cuda_library.LIBRARY.exists(), reason="the CUDA library is not built: no nvcc, or LAK_CUDA=0")
def test_the_kernels_are_listed_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = printed("--kernels").splitlines()
    for kernel in cuda_library.kernels():
        assert any(line.split()[:3] == [kernel.name, kernel.dtype, str(kernel.head_dim)] for line in lines), kernel
    assert "registers (sm_80" in "".join(lines)
    monkeypatch.setattr(cuda_library, "cuobjdump", lambda: None)  # without Triton
    assert len(printed("--kernels").splitlines()) == len(lines)
    monkeypatch.setattr(cuda_library, "LIBRARY", Path("/absent.so"))
    assert "CUDA library: not built" in printed("--kernels")
