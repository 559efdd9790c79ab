"""What a process with a real CUDA build of torch shows without a card (and with one).

`make test-cuda-torch` runs this in an environment of its own.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode
from typer.testing import CliRunner

import llama_adapter_kernels as lak
from llama_adapter_kernels import zero_gate_attention, zero_gate_attention_varlen, zero_gate_decode
from llama_adapter_kernels.cli import app
from llama_adapter_kernels.ops import availability, backends, cuda_library, cuda_tiles, registration

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    torch.version.cuda is None or not cuda_library.LIBRARY.exists(),
    reason="needs a torch built with CUDA and the CUDA library: make test-cuda-torch",
)
NO_CARD = pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a card")


def child(code: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)


def dynamic_symbols(kind: str) -> set[str]:
    text = subprocess.run(
        ["nm", "-D", kind, str(cuda_library.LIBRARY)], capture_output=True, text=True, check=True
    ).stdout
    return {line.split()[-1].split("@")[0] for line in text.splitlines()}


def test_the_libraries_load() -> None:
    assert registration.library_error is None
    assert registration.cuda_library_error is None
    assert cuda_library.torch_problem() is None


def test_the_record_of_tiles_goes_to_the_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One that the library cannot follow keeps it from being used, with the reason."""
    monkeypatch.setattr(cuda_tiles, "RECORD", tmp_path / "cuda_tiles.json")

    def recorded(capability: str) -> str | None:
        cuda_tiles.save({capability: cuda_tiles.Entry(capability, 32, 1.1, 1, "A card", "today")}, cuda_tiles.RECORD)
        cuda_tiles.forget()
        return registration._cuda_library_error()

    try:
        assert recorded("8.0") is None
        assert "expected 64, 32, or 0" in (recorded("7.5") or "")
    finally:
        cuda_library.choose_forward_keys((8, 0), 0)
        monkeypatch.undo()
        cuda_tiles.forget()
    assert registration._cuda_library_error() is None


def test_every_reference_of_the_cuda_library_is_bound() -> None:
    """By the dynamic linker, at loading (LD_BIND_NOW); torch's own functions to the libraries torch has loaded."""
    run = child("import torch, llama_adapter_kernels", LD_BIND_NOW="1", LD_DEBUG="bindings")
    assert run.returncode == 0, run.stderr[-2000:]
    bound: dict[str, str] = {}
    for line in run.stderr.splitlines():
        found = re.search(
            r"binding file \S*libllama_adapter_kernels_cuda\.so \[0\] to (\S+) \[0\]: \w+ symbol `(\w+)'", line
        )
        if found is not None:
            bound[found[2]] = Path(found[1]).name
    ours = {name for name in dynamic_symbols("--undefined-only") if "torch" in name}
    assert ours
    assert {bound.get(name) for name in ours} == {"libtorch_cpu.so"}
    # The one function of libtorch_cuda.so is not among them: it is looked up (see csrc/cuda/current_stream.cpp).
    assert "aoti_torch_get_current_cuda_stream" not in ours


def test_the_lookup_ends_in_torch() -> None:
    """The function that was found answers: torch refuses a device number that no machine has, instead of a null call."""
    run = child(
        "import ctypes, torch, llama_adapter_kernels\nfrom llama_adapter_kernels.ops import cuda_library\n"
        "library = ctypes.CDLL(str(cuda_library.LIBRARY))\nstream = ctypes.c_void_p()\n"
        "print('answer', library.lak_cuda_current_stream(99, ctypes.byref(stream)))"
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert int(re.findall(r"answer (-?\d+)", run.stdout)[0]) > 0  # -1 would be: not found


def test_the_runtime_inside_the_library_stays_inside() -> None:
    """torch brings a libcudart.so of its own. Both share the device's primary context; neither may bind to the other."""
    mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libcudart" in line}
    assert len(mapped) == 1
    for kind in ("--defined-only", "--undefined-only"):
        assert not {name for name in dynamic_symbols(kind) if re.match(r"cuda[A-Z]|__cuda|cu[A-Z]", name)}


def test_the_ops_are_registered() -> None:
    for op in ("forward", "backward", "decode"):
        for key in ("CPU", "CUDA", "Meta", "AutogradCUDA"):
            assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(f"llama_adapter_kernels::{op}", key), (
                op,
                key,
            )
            assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(f"llama_adapter_kernels_triton::{op}", key)


@NO_CARD
def test_without_a_driver_the_reasons_are_told() -> None:
    assert lak.available_backends("cuda") == ("reference",)
    assert lak.available_backends("cpu")[0] == "cpu"
    for backend in ("cuda", "triton"):
        reason = backends.unavailable_reason(backend, "cuda")
        assert reason is not None
        assert "driver" in reason or "No CUDA GPUs" in reason
        assert "\n" not in reason
    code, sentence = cuda_library.probe(), cuda_library.probe()[0]
    assert code[0] is not None and sentence is not None


@NO_CARD
def test_info_says_what_is_missing() -> None:
    result = CliRunner().invoke(app, ["info"])
    assert result.exit_code == 0, result.output
    assert "Backends on cuda:" in result.output
    assert re.search(r"cuda +not available: .*(driver|GPU)", result.output)
    assert re.search(r"triton +not available: .*(driver|GPU)", result.output)
    assert "sm_80" in result.output


@pytest.fixture
def fake_cards(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTensorMode]:
    """Tensors on a card that has a device and shapes but no memory; every backend believes that it works."""
    monkeypatch.setattr(availability, "unavailable_reason", lambda backend, device: None if backend != "cpu" else "no")
    with FakeTensorMode() as mode:
        yield mode


def problem() -> list[torch.Tensor]:
    shapes = [(2, 8, 33, 64), (2, 2, 33, 64), (2, 2, 33, 64), (1, 2, 10, 64), (1, 2, 10, 64)]
    return [
        *(torch.empty(shape, dtype=torch.bfloat16, device="cuda") for shape in shapes),
        torch.empty(8, device="cuda"),
    ]


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_traced_with_fake_cuda_tensors(fake_cards: FakeTensorMode, backend: str, compiled: bool) -> None:
    """Autograd's engine wants a real device even for fake tensors, so the op `backward` is called as it would call it."""

    def wrap(function: Any) -> Any:
        return torch.compile(function, backend="aot_eager", fullgraph=True) if compiled else function

    q, k, v, *prefix = problem()
    packet = torch.ops.llama_adapter_kernels if backend == "cuda" else torch.ops.llama_adapter_kernels_triton
    with lak.use_backend(backend):
        output = wrap(zero_gate_attention)(q, k, v, *prefix, is_causal=True)
        assert (output.device.type, output.shape, output.dtype) == ("cuda", q.shape, torch.bfloat16)
        assert wrap(zero_gate_decode)(q[:, :, :1], k, v, None, *prefix).shape == (2, 8, 1, 64)
        offsets = torch.zeros(3, dtype=torch.int32, device="cuda")
        packed = [t.transpose(1, 2).reshape(-1, t.shape[1], 64) for t in (q, k, v)]
        output = wrap(zero_gate_attention_varlen)(
            *packed, *prefix, cu_seqlens_q=offsets, cu_seqlens_k=offsets, max_seqlen_q=33, max_seqlen_k=33
        )
        assert output.shape == (66, 8, 64)
    gate = prefix[2].expand(1, 8)
    inputs, options = (q, k, v, *prefix[:2], gate), (*(None,) * 6, 0, 0, 0.125, True)

    def step(doutput: torch.Tensor) -> Any:
        output, logsumexp = packet.forward(*inputs, *options)
        return packet.backward(doutput, *inputs, output, logsumexp, *options, True, True, True, False)

    gradients = wrap(step)(torch.empty_like(q))
    assert [(g.shape, g.device.type) for g in gradients] == [(t.shape, "cuda") for t in inputs]


@pytest.mark.parametrize("card", ["sm80", "sm90"])
@pytest.mark.parametrize("pass_name", ["forward", "backward", "decode"])
def test_triton_compiles_up_to_the_launch(card: str, pass_name: str) -> None:
    """The launchers with this torch's Triton: every kernel of a pass is compiled as a launch would compile it."""
    pytest.importorskip("triton", minversion="3.6")
    from tests.support import ahead_of_time

    reports = ahead_of_time.compile_for(card, torch.bfloat16, 64, pass_name)
    assert reports
