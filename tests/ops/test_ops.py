"""What torch asks of an op: schema, fakes, autograd, compile, determinism; and what the gradients promise."""

import functools
import inspect
import itertools
import os
from collections.abc import Callable

import pytest
import torch

from llama_adapter_kernels import zero_gate_attention, zero_gate_attention_varlen, zero_gate_decode
from llama_adapter_kernels.ops import registration
from llama_adapter_kernels.ops.arguments import of_backward, of_forward
from llama_adapter_kernels.testing import Case, make_problem

CASES = [Case(), Case(mask="bool", prefix="table", batch=4, gate="prefix"), Case(prefix="none", window="both"),
         Case(lengths=((3, 5), (9, 9)))]  # fmt: skip


def op_arguments(case: Case, dtype: torch.dtype = torch.float32) -> tuple:
    problem = make_problem(case, dtype)
    t, a = problem.tensors, problem.arguments
    gate = None if t["gate"] is None else t["gate"].expand(t["prefix_key"].shape[0], case.heads_q)
    mask = a.get("attn_mask")
    return (
        t["query"], t["key"], t["value"], t["prefix_key"], t["prefix_value"], gate,
        None if mask is None else mask.expand(*t["query"].shape[:3], t["key"].shape[2]),
        a.get("key_start"), a.get("key_end"), a.get("prefix_index"), a.get("cu_seqlens_q"), a.get("cu_seqlens_k"),
        a.get("max_seqlen_q", 0), a.get("max_seqlen_k", 0), 0.2, True,
    )  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_opcheck_forward(case: Case) -> None:
    torch.library.opcheck(torch.ops.llama_adapter_kernels.forward.default, op_arguments(case))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_opcheck_backward_and_decode(case: Case) -> None:
    arguments = [a.detach() if isinstance(a, torch.Tensor) else a for a in op_arguments(case)]
    output, logsumexp = torch.ops.llama_adapter_kernels.forward(*arguments)
    backward = (torch.randn_like(output), *arguments[:6], output, logsumexp, *arguments[6:], True, True, True, False)
    torch.library.opcheck(torch.ops.llama_adapter_kernels.backward.default, backward)
    if case.lengths is None:
        decode = (*arguments[:6], *arguments[7:10], 0.2, True)
        torch.library.opcheck(torch.ops.llama_adapter_kernels.decode.default, decode)


@pytest.mark.parametrize("name", ["forward", "backward", "decode"])
def test_every_implementation_takes_what_the_schema_says(name: str) -> None:
    """C++ is checked when it is compiled (csrc/op/bind.h); here the text it was compiled from, and the fakes and Triton."""
    from llama_adapter_kernels.triton_kernels import launchers

    (text,) = (schema for schema in registration.SCHEMAS if schema.startswith(f"{name}("))
    for namespace in ("llama_adapter_kernels", "llama_adapter_kernels_triton"):
        schema = getattr(getattr(torch.ops, namespace), name).default._schema
        assert str(schema) == f"{namespace}::{text}"
    names = [argument.name for argument in schema.arguments]
    if name == "decode":
        assert list(inspect.signature(launchers.decode).parameters) == names
        return
    unpacked = of_forward(names) if name == "forward" else of_backward(names)
    fields = [pair for part in unpacked if isinstance(part, tuple) for pair in part._asdict().items()]
    if name == "backward":
        fields += [(field, got) for field, got in unpacked._asdict().items() if isinstance(got, str)]
    assert len(fields) == len(names)
    assert all(got in (field, f"need_{field}") for field, got in fields)


def test_the_log_sum_exp_takes_no_gradient() -> None:
    """It is saved for backward and returned as it is: a gradient through it would be silently zero."""
    inputs = op_arguments(Case())
    assert any(isinstance(a, torch.Tensor) and a.requires_grad for a in inputs)
    output, logsumexp = torch.ops.llama_adapter_kernels.forward(*inputs)
    assert output.requires_grad
    assert not logsumexp.requires_grad
    with pytest.raises(RuntimeError, match="does not require grad"):
        logsumexp.sum().backward()


def last_two_swapped(tensor: torch.Tensor) -> torch.Tensor:
    """The same values with stride 1 over rows instead of head_dim."""
    return tensor.detach().transpose(-1, -2).contiguous().transpose(-1, -2)


def overlapping_windows(tensor: torch.Tensor) -> torch.Tensor:
    """Row i is the elements i..i + D of one line, the same for all heads: strides [0, 0, 1, 1]."""
    return torch.randn(sum(tensor.shape[-2:])).as_strided(tensor.shape, (0, 0, 1, 1))


@pytest.mark.parametrize("layout", [last_two_swapped, overlapping_windows])
def test_any_strides_in_and_the_promised_ones_out(layout: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """What the fakes promise about strides must be what the kernels return, or compiled code reads the wrong memory."""
    arguments = list(op_arguments(Case()))
    arguments[:5] = [layout(tensor).requires_grad_() for tensor in arguments[:5]]
    torch.library.opcheck(torch.ops.llama_adapter_kernels.forward.default, arguments)
    plain = [tensor.detach().clone(memory_format=torch.contiguous_format) for tensor in arguments[:6]]
    output, logsumexp = torch.ops.llama_adapter_kernels.forward(*plain, *arguments[6:])
    inputs = [tensor.detach() for tensor in arguments[:6]]
    assert torch.equal(torch.ops.llama_adapter_kernels.forward(*inputs, *arguments[6:])[0], output)
    doutput = torch.randn_like(output)
    rest = (logsumexp, *arguments[6:], True, True, True, False)
    backward = (layout(doutput), *inputs, layout(output), *rest)
    torch.library.opcheck(torch.ops.llama_adapter_kernels.backward.default, backward)
    dense = (t.contiguous() for t in (layout(doutput), layout(output)))
    if layout is last_two_swapped:  # the windows are random anew
        got = torch.ops.llama_adapter_kernels.backward(*backward)
        want = torch.ops.llama_adapter_kernels.backward(next(dense), *plain, next(dense), *rest)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_without_a_graph_break(dynamic: bool) -> None:
    @torch.compile(fullgraph=True, dynamic=dynamic, backend="aot_eager")
    def step(q, k, v, pk, pv, gate):
        return zero_gate_attention(q * 1.0, k, v, pk, pv, torch.tanh(gate), is_causal=True)

    for seq in (17, 40):
        problem = make_problem(Case(seq_q=seq, seq_k=seq))
        inputs = list(problem.tensors.values())
        compiled = step(*inputs)
        gradients = torch.autograd.grad(compiled, inputs, problem.doutput)
        plain = zero_gate_attention(*inputs[:5], torch.tanh(inputs[5]), is_causal=True)
        expected = torch.autograd.grad(plain, inputs, problem.doutput)
        torch.testing.assert_close(compiled, plain)
        for got, want in zip(gradients, expected, strict=True):
            torch.testing.assert_close(got, want)


def test_compile_sees_use_backend_and_varlen_and_decode() -> None:
    problem = make_problem(Case(lengths=((5, 5), (9, 9))))
    t = {name: tensor.detach() for name, tensor in problem.tensors.items()}
    compiled = torch.compile(zero_gate_attention_varlen, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**t, **problem.arguments), zero_gate_attention_varlen(**t, **problem.arguments))
    q, k, v, pk, pv, gate = (x.detach() for x in make_problem(Case(seq_q=1)).tensors.values())
    lengths = torch.tensor([5, 33])
    compiled = torch.compile(zero_gate_decode, fullgraph=True, backend="aot_eager")
    want = zero_gate_decode(q, k, v, lengths, pk, pv, gate)
    torch.testing.assert_close(compiled(q, k, v, lengths, pk, pv, gate), want)


def test_second_derivative_raises() -> None:
    problem = make_problem(Case())
    q = problem.tensors["query"]
    (gradient,) = torch.autograd.grad(problem.forward("cpu").sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    "case",
    [
        Case(batch=1, heads_q=2, heads_kv=1, seq_q=4, seq_k=5, head_dim=3, prefix_length=3),
        Case(
            batch=3, heads_q=2, heads_kv=2, seq_q=3, seq_k=4, head_dim=2, prefix_length=2, prefix="table", gate="prefix"
        ),
        Case(batch=2, heads_q=2, heads_kv=1, seq_q=3, seq_k=4, head_dim=3, prefix_length=2, mask="bool", window="both"),
        Case(heads_q=2, heads_kv=1, head_dim=3, prefix_length=2, lengths=((2, 3), (0, 1), (3, 3)), gate="scalar"),
    ],
    ids=lambda case: case.name,
)
def test_gradcheck(case: Case) -> None:
    problem = make_problem(case, torch.float64)
    names = [name for name, tensor in problem.tensors.items() if tensor is not None]
    attention = zero_gate_attention if case.lengths is None else zero_gate_attention_varlen

    def function(*inputs: torch.Tensor) -> torch.Tensor:
        return attention(**dict(zip(names, inputs, strict=True)), **problem.arguments, backend="cpu")

    assert torch.autograd.gradcheck(function, [problem.tensors[name] for name in names])


def test_only_what_is_asked_for_is_computed() -> None:
    """Each subset of gradients equals those of the full set, bit for bit."""
    full = make_problem(Case(seq_q=70, seq_k=70))
    expected = full.backward(full.forward("cpu"))
    for wanted in itertools.chain(itertools.combinations(expected, 1), itertools.combinations(expected, 2)):
        problem = make_problem(Case(seq_q=70, seq_k=70))
        for name, tensor in problem.tensors.items():
            tensor.requires_grad_(name in wanted)
        for name, gradient in problem.backward(problem.forward("cpu")).items():
            assert torch.equal(gradient, expected[name]), (wanted, name)


def test_prefix_gradients_alone_skip_the_quadratic_part() -> None:
    """In the lowest adapted layer of a frozen model keys must not even be read: poison them after the forward pass."""
    problem = make_problem(Case(seq_q=70, seq_k=70))
    for name in ("query", "key", "value"):
        problem.tensors[name].requires_grad_(False)
    output = problem.forward("cpu")
    with torch.no_grad():  # .data: autograd would rightly refuse the changed tensor
        problem.tensors["key"].data.fill_(torch.nan)
        problem.tensors["value"].data.fill_(torch.nan)
    for name, gradient in problem.backward(output).items():
        assert not gradient.isnan().any(), name


@pytest.mark.parametrize(
    "case", [Case(seq_q=300, seq_k=300), Case(batch=1, heads_q=2, heads_kv=1, seq_q=700, seq_k=700)]
)
def test_same_result_every_run_and_for_any_number_of_threads(case: Case) -> None:
    problem = make_problem(case)
    threads = torch.get_num_threads()
    runs = []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            output = problem.forward("cpu")
            q, k, v, pk, pv, gate = (t.detach() for t in problem.tensors.values())
            decoded = zero_gate_decode(q[:, :, -1:], k, v, None, pk, pv, gate)
            runs.append([output, decoded, *problem.backward(output).values()])
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


def test_autocast_uses_the_lower_precision() -> None:
    problem = make_problem(Case())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert problem.forward("cpu").dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_every_dtype_but_float64(dtype: torch.dtype) -> None:
    """As scaled_dot_product_attention: a mixture that only autocast makes one."""
    q, k, v, pk, pv, gate = (t.detach() for t in make_problem(Case()).tensors.values())
    with torch.autocast("cpu", dtype=dtype):
        for mixed in ((q.half(), k.bfloat16(), v), (q.bfloat16(), k.bfloat16(), v.bfloat16())):
            assert zero_gate_attention(*mixed, pk, pv, gate).dtype == dtype
            assert zero_gate_decode(*mixed, None, pk, pv, gate).dtype == dtype
        assert zero_gate_attention(*(t.double() for t in (q, k, v, pk, pv, gate))).dtype == torch.float64


def test_gradient_of_the_gate_has_its_dtype_and_shape() -> None:
    problem = make_problem(Case(batch=3, prefix="table", gate="prefix"))
    want = problem.backward(problem.forward("cpu"))["gate"]
    for dtype in (torch.bfloat16, torch.float64):
        gate = problem.tensors["gate"].detach().to(dtype).requires_grad_()
        arguments = {**problem.tensors, **problem.arguments, "gate": gate}
        (got,) = torch.autograd.grad(zero_gate_attention(**arguments, backend="cpu"), gate, problem.doutput)
        assert got.dtype == dtype
        torch.testing.assert_close(got.float(), want, atol=0.5, rtol=0.05)
    one = torch.tensor([0.5], requires_grad=True)
    arguments["gate"] = one
    zero_gate_attention(**arguments, backend="cpu").sum().backward()
    assert one.grad.shape == (1,)


@pytest.mark.parametrize("position", range(6))
def test_forward_mode_is_refused_where_tangents_would_be_lost(position: int) -> None:
    tensors = [t.detach() for t in make_problem(Case()).tensors.values()]
    offsets = torch.tensor([0, 33])

    def padded(backend: str, x: torch.Tensor) -> torch.Tensor:
        return zero_gate_attention(*tensors[:position], x, *tensors[position + 1 :], backend=backend)

    def packed(backend: str, x: torch.Tensor) -> torch.Tensor:
        q, k, v, *prefix = [*tensors[:position], x, *tensors[position + 1 :]]
        q, k, v = (t[0].transpose(0, 1) for t in (q, k, v))
        return zero_gate_attention_varlen(
            q, k, v, *prefix, cu_seqlens_q=offsets, cu_seqlens_k=offsets, max_seqlen_q=33, max_seqlen_k=33,
            backend=backend,
        )  # fmt: skip

    def decode(backend: str, x: torch.Tensor) -> torch.Tensor:
        q, k, v, *prefix = [*tensors[:position], x, *tensors[position + 1 :]]
        return zero_gate_decode(q, k, v, None, *prefix, backend=backend)

    point = (tensors[position],), (torch.ones_like(tensors[position]),)
    for call in (padded, packed, decode):
        with pytest.raises(RuntimeError, match="no forward-mode derivative"):
            torch.func.jvp(functools.partial(call, "cpu"), *point)
        assert torch.func.jvp(functools.partial(call, "reference"), *point)[1].abs().sum() > 0


def test_fake_tensors_have_no_values_to_check() -> None:
    with torch._subclasses.FakeTensorMode():
        q, k, v = (torch.empty(2, 4, 9, 8) for _ in range(3))
        lengths = torch.ones(2, dtype=torch.int64)
        for backend in ("cpu", "reference"):
            zero_gate_attention(q, k, v, None, None, None, key_end=lengths, backend=backend)
            assert zero_gate_decode(q, k, v, lengths, None, None, None, backend=backend).shape == q.shape


def test_the_instruction_set_in_use_is_one_that_runs() -> None:
    usable, used = registration.cpu_instruction_sets()
    assert used == os.environ.get(registration.CPU_ISA_VARIABLE, usable[-1])
