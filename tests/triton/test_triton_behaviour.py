"""Decode, and what the kernels promise beyond values: what they do not read, skip, or leave behind."""

import importlib
import subprocess
import sys

import pytest
import torch

from llama_adapter_kernels import triton_kernels
from llama_adapter_kernels.testing import Case
from llama_adapter_kernels.triton_kernels import tuning
from tests.support import triton_checks
from tests.support.child_process import RunInChild

DECODE = [
    Case(batch=1, heads_q=2, heads_kv=1, seq_q=1, seq_k=300),  # many splits
    Case(batch=1, heads_q=2, heads_kv=1, seq_q=1, seq_k=20),  # one split: no combine kernel
    Case(batch=2, heads_q=8, heads_kv=2, seq_q=1, seq_k=150, window="end"),
    Case(batch=2, heads_q=4, heads_kv=1, seq_q=3, seq_k=90, window="both", prefix="table", gate="prefix"),
    Case(batch=3, heads_q=4, heads_kv=4, seq_q=7, seq_k=40, prefix="sequence", head_dim=40),
    Case(batch=1, heads_q=6, heads_kv=1, seq_q=5, seq_k=200, prefix_length=70),  # more rows than a tile, long prefix
    Case(batch=3, heads_q=4, heads_kv=2, seq_q=1, seq_k=20, prefix_length=70, window="end"),
    Case(batch=2, heads_q=2, heads_kv=2, seq_q=1, seq_k=0),
    Case(batch=2, heads_q=2, heads_kv=2, seq_q=2, seq_k=100, prefix="none"),
    Case(batch=2, heads_q=2, heads_kv=1, seq_q=4, seq_k=2),  # rows before the first key
    Case(batch=1, heads_q=2, heads_kv=1, seq_q=1, seq_k=100, scale=-0.2, layout="bshd"),
    Case(
        batch=1, heads_q=2, heads_kv=1, seq_q=3, seq_k=300, head_dim=40, layout="bshd"
    ),  # rows side by side, many splits
]
BEHAVIOUR = [
    triton_checks.unused_keys_hold_nan,
    triton_checks.gradients_repeat_bit_for_bit,
    triton_checks.index_out_of_range_is_nan,
    triton_checks.wild_lengths_stay_in_bounds,
    triton_checks.unused_prefix_may_be_nan,
    triton_checks.only_what_is_needed,
    triton_checks.expanded_and_transposed_tensors,
    triton_checks.compiles_without_graph_break,
]


@pytest.mark.parametrize("case", DECODE, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_decode_interpreted(interpreted: RunInChild, case: Case, dtype: torch.dtype) -> None:
    interpreted(triton_checks.decode, case, dtype)


def test_decode_interpreted_in_bfloat16(interpreted: RunInChild) -> None:
    interpreted(triton_checks.decode, DECODE[2], torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "case",
    [*DECODE, Case(batch=1, heads_q=32, heads_kv=8, seq_q=1, seq_k=20000, head_dim=128, window="end")],
    ids=lambda case: case.name,
)
def test_decode_on_gpu(cuda: torch.device, case: Case, dtype: torch.dtype) -> None:
    triton_checks.decode(case, dtype, "cuda")


@pytest.mark.parametrize("check", BEHAVIOUR)
def test_behaviour_interpreted(interpreted: RunInChild, check: RunInChild) -> None:
    interpreted(check)


@pytest.mark.gpu
@pytest.mark.parametrize("check", BEHAVIOUR)
def test_behaviour_on_gpu(cuda: torch.device, check: RunInChild) -> None:
    check("cuda")


@pytest.mark.parametrize("prefix", ["shared", "sequence", "none"])
def test_tail_of_packed_rows_is_zero(interpreted: RunInChild, prefix: str) -> None:
    interpreted(triton_checks.tail_of_packed_rows_is_zero, prefix)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        (Case(batch=2, heads_q=2, heads_kv=1, seq_q=70, seq_k=80, layout="bshd"), torch.bfloat16),
        (Case(batch=1, heads_q=1, heads_kv=1, seq_q=40, seq_k=90, head_dim=24, window="end"), torch.float16),
        (Case(heads_q=2, heads_kv=1, lengths=((70, 70), (9, 9), (80, 80))), torch.float16),
        (Case(heads_q=2, heads_kv=2, lengths=((40, 70), (60, 33)), is_causal=False), torch.float16),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_descriptors(interpreted: RunInChild, case: Case, dtype: torch.dtype) -> None:
    interpreted(triton_checks.attention_by_descriptors, case, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gate_zero_is_plain_attention(interpreted: RunInChild, dtype: torch.dtype) -> None:
    interpreted(triton_checks.gate_zero_is_plain_attention, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gate_zero_is_plain_attention_on_gpu(cuda: torch.device, dtype: torch.dtype) -> None:
    triton_checks.gate_zero_is_plain_attention(dtype, "cuda")


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements(cuda: torch.device) -> None:
    """Offsets beyond 32 bits; the interpreter would copy such a tensor, so ahead of time only their type is checked."""
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB of free GPU memory")
    heads, seq, dim = 33, 2**20, 64  # 2**31 elements are 32 heads
    buffer = torch.zeros(1, heads, seq, dim, dtype=torch.float16, device=cuda)
    buffer[:, -1] = torch.randn(seq, dim, device=cuda).half()
    query = torch.randn(1, heads, 1, dim, device=cuda).half()
    arguments = (None, None, None, None, None, None, None, None, None, 1, seq, 0.1, False)
    output, _ = triton_kernels.forward(query, buffer, buffer, *arguments)
    last = torch.softmax(0.1 * query[0, -1].double() @ buffer[0, -1].double().T, -1) @ buffer[0, -1].double()
    torch.testing.assert_close(output[0, -1].double(), last, atol=2e-3, rtol=2e-3)
    assert (output[:, :-1] == 0).all()


def test_import_does_not_need_triton() -> None:
    """The package imports, and says why it cannot run, where Triton is not installed."""
    code = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name == "triton":
            raise ModuleNotFoundError("No module named 'triton'")
sys.modules["triton"] = None
import torch, importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "triton" else find(name, *a)
from llama_adapter_kernels import triton_kernels
print(triton_kernels.unavailable_reason(torch.device("cpu")))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "not installed" in result.stdout


def test_unavailable_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "3.5.1")
    assert "3.6 or later, 3.5.1 is installed" in str(triton_kernels.unavailable_reason(cpu))
    monkeypatch.undo()
    from triton import knobs

    if not knobs.runtime.interpret:
        assert "runs on cuda, not on cpu" in str(triton_kernels.unavailable_reason(cpu))


def test_tiles_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    expected = tuning.table_entry("forward", torch.float16, 64, "sm80")
    assert tuning.tile_for("forward", torch.float16, 64, cpu) == expected
    monkeypatch.setenv(tuning.TILES_VARIABLE, "forward=64,16,4,1 decode=16,32,4,2")
    assert tuning.tile_for("forward", torch.float16, 64, cpu) == (64, 16, 4, 1)
    with tuning.use_tiles(forward=(16, 16, 4, 1)):
        assert tuning.tile_for("forward", torch.float16, 64, cpu) == (16, 16, 4, 1)
    with pytest.raises(ValueError, match="powers of two"), tuning.use_tiles(forward=(24, 16, 4, 1)):
        pass
    with pytest.raises(ValueError, match="expected a phase"), tuning.use_tiles(sideways=(16, 16, 4, 1)):
        pass
