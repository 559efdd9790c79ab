"""The ops on CUDA tensors from torch's dispatcher to the kernels, in the emulator: checks, copies, results, devices.

csrc/cuda/op_cuda.cpp is compiled for tensors of the CPU and under a namespace of its own; torch's device guard and stream
are stand-ins that note what they are asked (tests/emulator/torch_stand_in.cpp).
"""

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from llama_adapter_kernels.ops import registration
from llama_adapter_kernels.testing import Case, deviations, make_problem

SMALL = Case(batch=2, heads_q=4, heads_kv=2, seq_q=9, seq_k=9, head_dim=64, prefix_length=3)
TABLE = Case(batch=2, heads_q=2, heads_kv=1, seq_q=5, seq_k=7, head_dim=64, mask="bool", prefix="table", gate="prefix")
CASES = [SMALL, TABLE, Case(heads_q=2, heads_kv=1, head_dim=64, lengths=((3, 5), (9, 9)))]  # fmt: skip


@pytest.fixture(scope="module")
def ops(emulator: ModuleType) -> Any:
    packet = torch.ops.llama_adapter_kernels_emulated
    if not torch._C._dispatch_has_kernel_for_dispatch_key("llama_adapter_kernels_emulated::forward", "Meta"):
        registration.register("llama_adapter_kernels_emulated")
    return packet


@pytest.fixture(autouse=True)
def device(emulator: ModuleType) -> Iterator[Callable[..., None]]:
    """All memory is the kernels': what torch allocates in between is not registered one by one."""
    emulator.forget_memory()
    emulator.register_memory("memory", 0, 2**64 - 1, True)
    yield emulator.set_device
    emulator.set_device()
    emulator.forget_memory()


def arguments_of(case: Case, dtype: torch.dtype = torch.bfloat16) -> tuple[Any, list[Any]]:
    problem = make_problem(case, dtype)
    t, a = problem.tensors, problem.arguments
    gate = None if t["gate"] is None else t["gate"].expand(t["prefix_key"].shape[0], case.heads_q)
    mask = a.get("attn_mask")
    scale = t["query"].shape[-1] ** -0.5
    return problem, [
        *(t[name] for name in ("query", "key", "value", "prefix_key", "prefix_value")), gate,
        None if mask is None else mask.expand(*t["query"].shape[:3], t["key"].shape[2]),
        *(a.get(name) for name in ("key_start", "key_end", "prefix_index", "cu_seqlens_q", "cu_seqlens_k")),
        a.get("max_seqlen_q", 0), a.get("max_seqlen_k", 0), scale, a.get("is_causal", False),
    ]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_results_and_gradients(ops: Any, case: Case) -> None:
    problem, arguments = arguments_of(case)
    output, _ = ops.forward(*arguments)
    results = {"output": output.detach()} | {f"d{k}": g for k, g in problem.backward(output).items()}
    bad = [str(deviation) for deviation in deviations(problem, results) if not deviation.ok]
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_opcheck(ops: Any, case: Case) -> None:
    _, arguments = arguments_of(case)
    plain = [a.detach() if isinstance(a, Tensor) else a for a in arguments]
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.forward.default, plain, test_utils=tests)
    output, logsumexp = ops.forward(*plain)
    flags = (True, True, True, True)
    backward = (torch.randn_like(output), *plain[:6], output, logsumexp, *plain[6:], *flags)
    torch.library.opcheck(ops.backward.default, backward, test_utils=tests)
    if case.lengths is None:
        torch.library.opcheck(ops.decode.default, (*plain[:6], *plain[7:10], 0.2, True), test_utils=tests)


def misaligned(tensor: Tensor) -> Tensor:
    """Begins two bytes after a multiple of 16."""
    room = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:]
    assert room.data_ptr() % 16 == 2
    return room.view(tensor.shape).copy_(tensor)


def odd_strides(tensor: Tensor) -> Tensor:
    """Rows that begin at odd elements."""
    room = torch.empty(*tensor.shape[:-1], tensor.shape[-1] + 1, dtype=tensor.dtype)[..., :-1]
    return room.copy_(tensor)


def swapped(tensor: Tensor) -> Tensor:
    """Stride 1 over rows instead of head_dim."""
    return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)


@pytest.mark.parametrize("layout", [misaligned, odd_strides, swapped])
def test_other_layouts_are_copied_and_the_promised_strides_returned(
    ops: Any, layout: Callable[[Tensor], Tensor]
) -> None:
    _, arguments = arguments_of(SMALL)
    plain = [a.detach() if isinstance(a, Tensor) else a for a in arguments]
    other = [layout(a) for a in plain[:5]] + plain[5:]
    output, logsumexp = ops.forward(*plain)
    result, statistics = ops.forward(*other)
    assert torch.equal(output, result) and torch.equal(logsumexp, statistics)
    assert result.stride() == torch.empty_like(other[0]).stride()
    doutput = torch.randn_like(output)
    flags = (True, True, True, True)
    expected = ops.backward(doutput, *plain[:6], output, logsumexp, *plain[6:], *flags)
    gradients = ops.backward(layout(doutput), *other[:6], layout(output), logsumexp, *other[6:], *flags)
    for want, got, given in zip(expected, gradients, other, strict=False):
        assert torch.equal(want, got)
        assert got.stride() == torch.empty_like(given).stride() or given is other[5]


def test_tokens_after_the_last_sequence_are_zero(ops: Any) -> None:
    _, arguments = arguments_of(Case(heads_q=2, heads_kv=1, head_dim=64, lengths=((3, 3), (9, 9))))
    plain = [a.detach() if isinstance(a, Tensor) else a for a in arguments]
    plain[10] = plain[11] = torch.tensor([0, 3, 5], dtype=torch.int32)
    output, logsumexp = ops.forward(*plain)
    gradients = ops.backward(output, *plain[:6], output, logsumexp, *plain[6:], True, True, True, False)
    for tensor in (output, *gradients[:3]):
        assert (tensor[5:] == 0).all() and (tensor[:5] != 0).any()


def test_the_tensors_device_is_current_for_the_launch_and_given_back(
    emulator: ModuleType, ops: Any, device: Callable[..., None]
) -> None:
    """By torch's guard alone. The emulator has no cudaSetDevice, which would make a context on the other device."""
    _, arguments = arguments_of(SMALL)
    plain = [a.detach() if isinstance(a, Tensor) else a for a in arguments]
    for index in (1, 0):
        device(of_tensors=index)
        output, logsumexp = ops.forward(*plain)
        assert emulator.last_launch() == (index, 4096 + index, 0)
        ops.backward(output, *plain[:6], output, logsumexp, *plain[6:], True, True, True, False)
        assert emulator.last_launch() == (index, 4096 + index, 0)
        ops.decode(*plain[:6], *plain[7:10], 0.2, True)
        assert emulator.last_launch() == (index, 4096 + index, 0)
        with pytest.raises(RuntimeError, match="expected float32, bfloat16 or float16"):
            ops.forward(*(a.double() if isinstance(a, Tensor) else a for a in plain))
        assert emulator.last_launch()[2] == 0  # after an error, too


@pytest.mark.parametrize(
    ("says", "message"),
    [
        ({"torch_works": False}, "torch has no stream"),
        ({"capability": 75}, "needs a GPU of compute capability 8.0 or later"),
        ({"code_error": 209}, "no code for this GPU"),
        ({"driver_error": 35}, "the driver is too old"),
    ],
)
def test_errors_name_the_backend(ops: Any, device: Callable[..., None], says: dict[str, Any], message: str) -> None:
    _, arguments = arguments_of(SMALL)
    device(**says)
    with pytest.raises(RuntimeError, match=rf"llama_adapter_kernels \(cuda\): .*{message}"):
        ops.forward(*(a.detach() if isinstance(a, Tensor) else a for a in arguments))


def test_bad_shapes_are_named_before_anything_is_copied(ops: Any) -> None:
    _, arguments = arguments_of(SMALL)
    plain = [a.detach() if isinstance(a, Tensor) else a for a in arguments]
    for position, name in ((0, "query"), (1, "key")):
        with pytest.raises(RuntimeError, match=f"{name}: expected 4 dimensions, got shape \\[\\]"):
            ops.forward(*plain[:position], torch.tensor(1.0), *plain[position + 1 :])
