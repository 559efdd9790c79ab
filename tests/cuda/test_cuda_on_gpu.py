"""The CUDA kernels on a real device, through the public functions. Shapes larger than the emulator's, many repeats."""

import itertools
from dataclasses import replace

import pytest
import torch

from llama_adapter_kernels import available_backends, zero_gate_attention, zero_gate_decode
from llama_adapter_kernels.ops.backends import unavailable_reason
from llama_adapter_kernels.testing import Case, assert_matches_reference, deviations, make_problem
from tests.cuda.test_cuda_emulated import CASES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        "cuda" not in available_backends("cuda"),
        reason=f"the CUDA backend is not available: {unavailable_reason('cuda', 'cuda')}",
    ),
]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LARGE = [
    *(Case(batch=2, heads_q=8, heads_kv=2, seq_q=s, seq_k=s, head_dim=d, is_causal=c)
      for s, d, c in itertools.product((512, 1000), (64, 128), (True, False))),
    Case(batch=2, heads_q=4, heads_kv=4, seq_q=300, seq_k=777, head_dim=256, window="both"),
    Case(batch=3, heads_q=4, heads_kv=1, seq_q=513, seq_k=513, head_dim=96, prefix="table", gate="prefix"),
    Case(lengths=((700, 700), (1, 1), (0, 0), (300, 900)), head_dim=128, heads_q=8, heads_kv=2),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*CASES, *LARGE], ids=lambda case: case.name)
def test_forward_and_backward(case: Case, dtype: torch.dtype) -> None:
    assert_matches_reference(make_problem(case, dtype, "cuda"), "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_deterministic_gradients(dtype: torch.dtype) -> None:
    problem = make_problem(Case(batch=2, heads_q=8, heads_kv=2, seq_q=700, seq_k=700, head_dim=128), dtype, "cuda")
    torch.use_deterministic_algorithms(True)
    try:
        runs = [problem.backward(problem.forward("cuda")) for _ in range(20)]
    finally:
        torch.use_deterministic_algorithms(False)
    for run in runs[1:]:
        assert all(torch.equal(run[name], runs[0][name]) for name in run)


def test_a_thousand_repeats_give_the_same_output() -> None:
    """A race would show as a difference now and then; blocks of all sizes are in flight at the same time."""
    problem = make_problem(
        Case(batch=4, heads_q=16, heads_kv=4, seq_q=515, seq_k=515, head_dim=64), torch.bfloat16, "cuda"
    )
    tensors = {name: None if t is None else t.detach() for name, t in problem.tensors.items()}
    first = zero_gate_attention(**tensors, **problem.arguments, backend="cuda")
    differing = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(1000):
        differing += (zero_gate_attention(**tensors, **problem.arguments, backend="cuda") != first).sum()
    assert differing.item() == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("window", ["none", "end", "both"])
def test_decode(dtype: torch.dtype, head_dim: int, window: str) -> None:
    case = Case(batch=3, heads_q=8, heads_kv=2, seq_q=1, seq_k=5000, head_dim=head_dim, window=window)
    problem = make_problem(case, dtype, "cuda")
    cache = {"key_cache": problem.tensors["key"], "value_cache": problem.tensors["value"]}
    rest = {name: t for name, t in problem.tensors.items() if name not in ("key", "value")}
    arguments = dict(problem.arguments)
    arguments.pop("is_causal", None)
    with torch.no_grad():
        output = zero_gate_decode(
            **rest, **cache, cache_lengths=arguments.pop("key_end", None), **arguments, backend="cuda"
        )
    (found,) = deviations(replace(problem, doutput=None), {"output": output})
    assert found.ok, str(found)


def test_more_than_two_to_the_31_elements() -> None:
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB of free GPU memory")
    heads, seq, dim = 33, 2**20, 64  # 2**31 elements are 32 heads
    buffer = torch.zeros(1, heads, seq, dim, dtype=torch.float16, device="cuda")
    buffer[:, -1] = torch.randn(seq, dim, device="cuda").half()
    query = torch.randn(1, heads, 1, dim, device="cuda").half()
    output = zero_gate_attention(query, buffer, buffer, None, None, None, scale=0.1, backend="cuda")
    weights = torch.softmax(0.1 * query[0, -1].double() @ buffer[0, -1].double().T, -1)
    torch.testing.assert_close(output[0, -1].double(), weights @ buffer[0, -1].double(), atol=2e-3, rtol=2e-3)
    assert (output[:, :-1] == 0).all()


def test_in_a_cuda_graph() -> None:
    problem = make_problem(
        Case(batch=2, heads_q=4, heads_kv=2, seq_q=100, seq_k=100, head_dim=128), torch.bfloat16, "cuda"
    )
    tensors = {name: None if t is None else t.detach() for name, t in problem.tensors.items()}

    def call() -> torch.Tensor:
        return zero_gate_attention(**tensors, **problem.arguments, backend="cuda")

    expected = call().clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call()
    output.zero_()
    graph.replay()
    assert torch.equal(output, expected)


def test_misaligned_views_are_copied() -> None:
    case = Case(batch=1, heads_q=2, heads_kv=2, seq_q=33, seq_k=33, head_dim=64)
    problem = make_problem(case, torch.bfloat16, "cuda")
    tensors = {name: None if t is None else t.detach() for name, t in problem.tensors.items()}
    expected = zero_gate_attention(**tensors, **problem.arguments, backend="cuda")
    key = tensors["key"]
    assert key is not None
    shifted = torch.empty(key.numel() + 1, dtype=key.dtype, device="cuda")[1:].view(key.shape).copy_(key)
    assert shifted.data_ptr() % 16 != 0
    tensors["key"] = shifted
    assert torch.equal(zero_gate_attention(**tensors, **problem.arguments, backend="cuda"), expected)


def test_gradient_of_what_is_asked_for() -> None:
    problem = make_problem(
        Case(batch=2, heads_q=4, heads_kv=2, seq_q=65, seq_k=65, head_dim=64), torch.bfloat16, "cuda"
    )
    every = problem.backward(problem.forward("cuda"))
    for name in ("query", "key", "value"):
        tensor = problem.tensors[name]
        assert tensor is not None
        tensor.requires_grad_(False)
    some = problem.backward(problem.forward("cuda"))
    assert set(some) == {"prefix_key", "prefix_value", "gate"}
    assert all(torch.equal(some[name], every[name]) for name in some)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": torch.float64}, "float64"),
        ({"head_dim": 60}, "multiple of 8 up to 256"),
        ({"head_dim": 264}, "multiple of 8 up to 256"),
    ],
)
def test_what_the_kernels_do_not_do_is_refused(change: dict[str, object], message: str) -> None:
    dtype = change.get("dtype", torch.float16)
    query = torch.randn(1, 2, 4, int(change.get("head_dim", 64)), device="cuda", dtype=dtype)  # type: ignore[call-overload, arg-type]
    with pytest.raises(RuntimeError, match=message):
        zero_gate_attention(query, query, query, None, None, None, backend="cuda")


def test_compiles_without_a_graph_break() -> None:
    problem = make_problem(
        Case(batch=1, heads_q=4, heads_kv=2, seq_q=64, seq_k=64, head_dim=64), torch.bfloat16, "cuda"
    )

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(**arguments: object) -> torch.Tensor:
        return zero_gate_attention(**arguments, backend="cuda")  # type: ignore[arg-type]

    output = compiled(**problem.tensors, **problem.arguments)
    assert torch.equal(output, problem.forward("cuda"))
    output.sum().backward()
    gate = problem.tensors["gate"]
    assert gate is not None
    assert gate.grad is not None
