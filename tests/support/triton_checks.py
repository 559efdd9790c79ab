"""What the tests run, in the interpreter's process on CPU tensors or in this one on a GPU.

Memory that a kernel should have written holds NaN before: deterministic mode fills what torch.empty returns.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from llama_adapter_kernels import triton_kernels, zero_gate_attention, zero_gate_decode
from llama_adapter_kernels.testing import Case, Problem, assert_matches_reference, deviations, make_problem
from llama_adapter_kernels.triton_kernels import tuning
from llama_adapter_kernels.triton_kernels.tuning import use_tiles

# Tiles so small that short sequences cross their edges. Rows and keys differ, so that a mix-up shows.
SMALL = {
    "forward": (32, 16, 4, 1),
    "backward_keys": (16, 32, 4, 1),
    "backward_queries": (32, 16, 4, 1),
    "backward_rows": (32, 0, 4, 1),
    "decode": (16, 16, 4, 1),
}


@contextmanager
def poisoned_memory(device: str) -> Iterator[None]:
    with use_tiles(**(SMALL if device == "cpu" else {})):
        torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)


def attention(case: Case, dtype: torch.dtype, device: str = "cpu", gradients: bool = True) -> None:
    """Output and gradients against float64 by the rule of `testing`."""
    with poisoned_memory(device):
        assert_matches_reference(make_problem(case, dtype, device), "triton", gradients)


def attention_by_descriptors(case: Case, dtype: torch.dtype) -> None:
    """As `attention`, with the loads of a Hopper card: blocks that are seen whole come by tensor descriptors."""
    from triton.runtime import interpreter

    has_descriptors, load = tuning.has_descriptors, interpreter.InterpreterBuilder.create_descriptor_load
    loads = 0

    def counted(*arguments: Any) -> Any:
        nonlocal loads
        loads += 1
        return load(*arguments)

    tuning.has_descriptors = lambda device: True
    interpreter.InterpreterBuilder.create_descriptor_load = counted
    try:
        attention(case, dtype)
    finally:
        tuning.has_descriptors, interpreter.InterpreterBuilder.create_descriptor_load = has_descriptors, load
    assert loads > 0


def decode(case: Case, dtype: torch.dtype, device: str = "cpu") -> None:
    decode_problem(make_problem(case, dtype, device), device)


def decode_problem(problem: Problem, device: str = "cpu") -> None:
    truth_problem = Problem(problem.case, problem.tensors, problem.arguments)  # without gradients
    with poisoned_memory(device), torch.no_grad():
        found = deviations(truth_problem, {"output": _decode(problem)})
    assert all(deviation.ok for deviation in found), f"{problem.case.name}: {found[0]}"


def _decode(problem: Problem) -> Tensor:
    arguments = {k: v for k, v in problem.arguments.items() if k not in ("is_causal", "key_end")}
    tensors = {k: v for k, v in problem.tensors.items() if k not in ("key", "value")}
    return zero_gate_decode(
        **tensors, key_cache=problem.tensors["key"], value_cache=problem.tensors["value"],
        cache_lengths=problem.arguments.get("key_end"), backend="triton", **arguments,
    )  # fmt: skip


def unused_keys_hold_nan(device: str = "cpu") -> None:
    """Keys outside of [key_start, key_end), as in a cache that is not full: nothing of them may be used."""
    case = Case(batch=2, heads_q=2, heads_kv=1, seq_q=20, seq_k=70, window="both")
    problem = make_problem(case, torch.float32, device)
    start, end = (problem.arguments[name] for name in ("key_start", "key_end"))
    end.clamp_(min=40)
    with poisoned_memory(device):
        clean = problem.forward("triton")
        clean_gradients = problem.backward(clean)
        clean_decode = _without_gradient(problem)
        for b in range(2):
            for name in ("key", "value"):
                tensor = problem.tensors[name]
                assert tensor is not None
                tensor.data[b, :, : start[b]] = torch.nan
                tensor.data[b, :, end[b] :] = torch.nan
        output = problem.forward("triton")
        assert torch.equal(output, clean)
        assert torch.equal(_without_gradient(problem), clean_decode)
        for name, gradient in problem.backward(output).items():
            assert torch.equal(gradient, clean_gradients[name]), name
        for b in range(2):
            for name in ("key", "value"):
                outside = torch.cat([clean_gradients[name][b, :, : start[b]], clean_gradients[name][b, :, end[b] :]], 1)
                assert (outside == 0).all(), f"gradient of a {name} that no query may see"


def _without_gradient(problem: Problem) -> Tensor:
    with torch.no_grad():
        return _decode(problem)


def gate_zero_is_plain_attention(dtype: torch.dtype, device: str = "cpu") -> None:
    """Bit for bit; the prefix then has no gradient, the gate has one."""
    problem = make_problem(Case(heads_q=2, heads_kv=1), dtype, device)
    gate = problem.tensors["gate"]
    assert gate is not None
    gate.data.zero_()
    with poisoned_memory(device):
        output = problem.forward("triton")
        gradients = problem.backward(output)
        words = [problem.tensors[name] for name in ("query", "key", "value")]
        plain = zero_gate_attention(*words, None, None, None, is_causal=True, backend="triton")
        assert torch.equal(output, plain)
        assert (gradients["prefix_key"] == 0).all()
        assert (gradients["prefix_value"] == 0).all()
        assert (gradients["gate"] != 0).all()
        for name, expected in zip(
            ("query", "key", "value"), torch.autograd.grad(plain, words, problem.doutput), strict=True
        ):
            torch.testing.assert_close(gradients[name], expected, rtol=1e-2, atol=2e-2 * expected.abs().max().item())


def gradients_repeat_bit_for_bit(device: str = "cpu") -> None:
    problem = make_problem(Case(batch=2, heads_q=4, heads_kv=1, prefix="table"), torch.float16, device)
    with poisoned_memory(device):
        first, second = (problem.backward(problem.forward("triton")) for _ in range(2))
    for name, gradient in first.items():
        assert torch.equal(gradient, second[name]), name


def _direct(case: Case, device: str, dtype: torch.dtype = torch.float32) -> tuple[tuple[Tensor | None, ...], Problem]:
    """The problem's tensors as the ops get them."""
    problem = make_problem(case, dtype, device)
    names = ("query", "key", "value", "prefix_key", "prefix_value", "gate")
    return tuple(None if (t := problem.tensors[n]) is None else t.detach() for n in names), problem


def index_out_of_range_is_nan(device: str = "cpu") -> None:
    """On a GPU nobody reads the index first: the sequence is NaN, its neighbours are not, nothing crashes."""
    tensors, _ = _direct(Case(batch=4, heads_q=2, heads_kv=1, seq_q=5, seq_k=5, prefix="table", gate="prefix"), device)
    index = torch.tensor([1, 3, -2, 2**30], dtype=torch.int32, device=device)
    optional = (None, None, None, index, None, None, 5, 5, 0.2, True)
    with poisoned_memory(device):
        output, logsumexp = triton_kernels.forward(*tensors, *optional)
        assert output[0].isfinite().all()
        assert output[1:].isnan().all()
        gradients = triton_kernels.backward(output, *tensors, output, logsumexp, *optional, True, True, True, True)
        assert gradients[0][0].isfinite().all()
        assert gradients[0][1:].isnan().all()
        assert all(gradient.isfinite().all() for gradient in gradients[3:]), "no entry was used by the bad sequences"
        output = triton_kernels.decode(*tensors, None, None, index, 0.2, True)
        assert output[0].isfinite().all()
        assert output[1:].isnan().all()


def wild_lengths_stay_in_bounds(device: str = "cpu") -> None:
    """Lengths and offsets that make no sense are clamped: as if the nearest sensible value had been given."""
    tensors, _ = _direct(Case(batch=3, heads_q=2, heads_kv=1, seq_q=9, seq_k=20), device)
    wild, sensible = (
        [torch.tensor(values, dtype=torch.int32, device=device) for values in pair]
        for pair in (([-(2**31), 25, 2**30], [2**31 - 1, 10, -7]), ([0, 10, 0], [20, 10, 0]))
    )
    with poisoned_memory(device):
        results = [triton_kernels.forward(*tensors, None, *lengths, None, None, None, 9, 20, 0.2, True)
                   for lengths in (wild, sensible)]  # fmt: skip
        assert torch.equal(results[0][0], results[1][0])
        for prefix in ("shared", "sequence"):
            packed, problem = _direct(Case(heads_q=2, heads_kv=1, lengths=((8, 8), (9, 9)), prefix=prefix), device)
            for numbers in ([-5, 2**30, 3], [12, 4, 17], [0, 17, 2**31 - 1], [3, 3, -1]):
                offsets = torch.tensor(numbers, dtype=torch.int32, device=device)
                optional = (None, None, None, None, offsets, offsets, 17, 17, 0.2, True)
                output, logsumexp = triton_kernels.forward(*packed, *optional)
                needed = (True, True, True, True)
                triton_kernels.backward(problem.doutput, *packed, output, logsumexp, *optional, *needed)
                assert output.isfinite().all() or numbers[0] != -5, "every row lies in the first sequence"


def tail_of_packed_rows_is_zero(prefix: Literal["shared", "sequence", "none"], device: str = "cpu") -> None:
    """Tokens after the last sequence belong to none: their gradient is zero, not what memory held."""
    tensors, problem = _direct(Case(heads_q=2, heads_kv=1, lengths=((30, 30), (50, 50)), prefix=prefix), device)
    offsets = torch.tensor([0, 30, 33], dtype=torch.int32, device=device)
    optional = (None, None, None, None, offsets, offsets, 30, 30, 0.2, True)
    with poisoned_memory(device):
        output, logsumexp = triton_kernels.forward(*tensors, *optional)
        assert problem.doutput is not None
        gradients = triton_kernels.backward(
            problem.doutput, *tensors, output, logsumexp, *optional, True, True, True, True
        )
    assert (logsumexp[:, 33:] == -torch.inf).all() or prefix == "sequence"
    for rows in (output, *gradients[:3]):
        assert (rows[33:] == 0).all()
        assert (rows[:33] != 0).any()
        assert rows.isfinite().all()


def unused_prefix_may_be_nan(device: str = "cpu") -> None:
    """Its sequence has no query: its gradients are zero, and nobody else's are NaN."""
    case = Case(heads_q=2, heads_kv=1, lengths=((5, 5), (0, 3)), prefix="sequence", gate="prefix")
    tensors, problem = _direct(case, device)
    for tensor in (tensors[3], tensors[4]):
        assert tensor is not None
        tensor[1] = torch.nan
    offsets = problem.arguments["cu_seqlens_q"].to(device), problem.arguments["cu_seqlens_k"].to(device)
    optional = (None, None, None, None, *offsets, 5, 5, 0.2, True)
    output, logsumexp = triton_kernels.forward(*tensors, *optional)
    assert problem.doutput is not None
    gradients = triton_kernels.backward(problem.doutput, *tensors, output, logsumexp, *optional, True, True, True, True)
    for result in (output, *gradients):
        assert result is not None
        assert result.isfinite().all()
    for result in gradients[3:]:
        assert result is not None
        assert (result[1] == 0).all()
        assert (result[0] != 0).any()


def only_what_is_needed(device: str = "cpu") -> None:
    """Frozen words: nothing quadratic runs, and the prefix's gradients are those of the full backward."""
    from llama_adapter_kernels.triton_kernels import backward_launcher

    tensors, problem = _direct(Case(heads_q=2, heads_kv=1), device)
    optional = (None, None, None, None, None, None, 33, 33, 0.2, True)
    launched: list[str] = []
    run = backward_launcher.run

    def recording_run(kernel: Any, *arguments: Any, **constants: Any) -> None:
        launched.append(kernel.__name__)
        run(kernel, *arguments, **constants)

    backward_launcher.run = recording_run
    try:
        with poisoned_memory(device):
            output, logsumexp = triton_kernels.forward(*tensors, *optional)
            arguments = (problem.doutput, *tensors, output, logsumexp, *optional)
            everything = triton_kernels.backward(*arguments, True, True, True, True)
            assert "backward_words_kernel" in launched
            for needed in ((False, False, True), (True, False, False), (False, True, False)):
                launched.clear()
                gradients = triton_kernels.backward(*arguments, *needed, True)
                per_result = (needed[0], needed[1], needed[1], needed[2], needed[2], needed[2])
                for gradient, expected, asked in zip(gradients, everything, per_result, strict=True):
                    assert torch.equal(gradient, expected) if asked else gradient.shape == (0,)
                if needed == (False, False, True):
                    assert "backward_words_kernel" not in launched, launched
    finally:
        backward_launcher.run = run


def expanded_and_transposed_tensors(device: str = "cpu") -> None:
    """A stride of 0 (the gradient of a sum), and a last dimension that is not dense."""
    problem = make_problem(Case(heads_q=2, heads_kv=2, head_dim=16, is_causal=False), torch.float32, device)
    problem.doutput = torch.ones((), device=device).expand(problem.doutput.shape)  # type: ignore[union-attr]
    query = problem.tensors["query"]
    assert query is not None
    problem.tensors["query"] = query.detach().transpose(2, 3).contiguous().transpose(2, 3).requires_grad_()
    with poisoned_memory(device):
        output = problem.forward("triton")
        assert output.stride() == torch.empty_like(problem.tensors["query"]).stride()
        results = {"output": output} | {f"d{n}": g for n, g in problem.backward(output).items()}
    bad = [str(deviation) for deviation in deviations(problem, results) if not deviation.ok]
    assert not bad, bad


def compiles_without_graph_break(device: str = "cpu") -> None:
    problem = make_problem(Case(heads_q=2, heads_kv=1), torch.float32, device)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *tensors: zero_gate_attention(*tensors, is_causal=True, backend="triton").sin(),
        fullgraph=True, backend="aot_eager",
    )  # fmt: skip
    tensors = [t for t in problem.tensors.values() if t is not None]
    expected = zero_gate_attention(*tensors, is_causal=True, backend="triton").sin()
    result = compiled(*tensors)
    assert torch.equal(result, expected)
    for gradient, plain in zip(
        torch.autograd.grad(result.sum(), tensors), torch.autograd.grad(expected.sum(), tensors), strict=True
    ):
        assert torch.equal(gradient, plain)
