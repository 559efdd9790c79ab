"""What must hold whatever the inputs: identities of the operation, for every backend that runs on this CPU."""

import functools

import pytest
import torch
import torch.nn.functional as F

from llama_adapter_kernels import zero_gate_attention, zero_gate_attention_varlen, zero_gate_decode
from llama_adapter_kernels.bench.attention_peers import two_calls
from llama_adapter_kernels.testing import Case, make_problem

BACKENDS = ("cpu", "reference")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


def tensors(case: Case, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [t.detach() for t in make_problem(case, dtype).tensors.values() if t is not None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gate_zero_is_plain_attention_bit_for_bit(backend: str, dtype: torch.dtype) -> None:
    q, k, v, pk, pv, gate = tensors(Case(seq_q=130, seq_k=130), dtype)
    gate = torch.zeros_like(gate).requires_grad_()
    pk, pv = pk.requires_grad_(), pv.requires_grad_()
    output = zero_gate_attention(q, k, v, pk, pv, gate, is_causal=True, backend=backend)
    plain = zero_gate_attention(q, k, v, None, None, None, is_causal=True, backend=backend)
    assert torch.equal(output, plain)
    output.backward(torch.randn_like(output))
    assert (pk.grad == 0).all() and (pv.grad == 0).all()
    assert (gate.grad != 0).all()


def test_one_slot_adds_its_value(backend: str) -> None:
    q, k, v, pk, pv, gate = tensors(Case(heads_q=4, heads_kv=4, prefix_length=1))
    output = zero_gate_attention(q, k, v, pk, pv, gate, is_causal=True, backend=backend)
    plain = zero_gate_attention(q, k, v, None, None, None, is_causal=True, backend=backend)
    torch.testing.assert_close(output, plain + gate[:, None, None] * pv)


def test_linear_in_gate(backend: str) -> None:
    q, k, v, pk, pv, gate = tensors(Case())
    at = lambda factor: zero_gate_attention(q, k, v, pk, pv, factor * gate, backend=backend)  # noqa: E731
    torch.testing.assert_close(at(3.0) - at(0.0), 3 * (at(1.0) - at(0.0)), atol=1e-5, rtol=1e-5)


def test_order_of_slots_does_not_matter(backend: str) -> None:
    q, k, v, pk, pv, gate = tensors(Case(prefix_length=33))
    order = torch.randperm(33)
    torch.testing.assert_close(
        zero_gate_attention(q, k, v, pk[:, :, order], pv[:, :, order], gate, backend=backend),
        zero_gate_attention(q, k, v, pk, pv, gate, backend=backend),
    )


@pytest.mark.parametrize("gate_value", [0.7, -1.3])
def test_equals_two_attention_calls(backend: str, gate_value: float) -> None:
    q, k, v, pk, pv, _ = tensors(Case(heads_q=4, heads_kv=2, seq_q=65, seq_k=65))
    gate = torch.tensor(gate_value)
    two = two_calls(q, k, v, pk, pv, gate, attn_mask=None, is_causal=True)
    one = zero_gate_attention(q, k, v, pk, pv, gate, is_causal=True, backend=backend)
    torch.testing.assert_close(one, two, atol=2e-6, rtol=1e-5)


def test_varlen_is_the_batch_of_its_sequences(backend: str) -> None:
    lengths = ((5, 9), (0, 3), (66, 66), (1, 130))
    problem = make_problem(Case(lengths=lengths, prefix="table", gate="prefix"))
    t = {name: tensor.detach() for name, tensor in problem.tensors.items()}
    a = problem.arguments
    packed = zero_gate_attention_varlen(**t, **a, backend=backend)
    for b in range(len(lengths)):
        q, k = (slice(*a[name][b : b + 2].tolist()) for name in ("cu_seqlens_q", "cu_seqlens_k"))
        alone = zero_gate_attention(
            t["query"][q].transpose(0, 1)[None], t["key"][k].transpose(0, 1)[None], t["value"][k].transpose(0, 1)[None],
            t["prefix_key"], t["prefix_value"], t["gate"], prefix_index=a["prefix_index"][b : b + 1], is_causal=True,
            backend=backend,
        )  # fmt: skip
        torch.testing.assert_close(packed[q], alone[0].transpose(0, 1))


def test_decoding_step_by_step_is_one_causal_pass(backend: str) -> None:
    q, k, v, pk, pv, gate = tensors(Case(seq_q=12, seq_k=12, head_dim=64))
    full = zero_gate_attention(q, k, v, pk, pv, gate, is_causal=True, backend=backend)
    for step in (0, 1, 7, 11):
        lengths = torch.full((2,), step + 1)
        row = zero_gate_decode(q[:, :, step : step + 1], k, v, lengths, pk, pv, gate, backend=backend)
        torch.testing.assert_close(row, full[:, :, step : step + 1])


def test_shared_prefix_is_the_expanded_one_and_index_is_a_gather(backend: str) -> None:
    # The kernels promise equal bits. Eager matrix products round as their shapes and strides happen to have it.
    same = functools.partial(torch.testing.assert_close, **({"atol": 0, "rtol": 0} if backend == "cpu" else {}))
    q, k, v, pk, pv, gate = tensors(Case(batch=4, prefix="table", gate="prefix"))
    index = torch.tensor([2, 0, 2, 1])
    chosen = zero_gate_attention(q, k, v, pk, pv, gate, prefix_index=index, backend=backend)
    gathered = zero_gate_attention(q, k, v, pk[index], pv[index], gate[index], backend=backend)
    same(chosen, gathered)
    shared = zero_gate_attention(q, k, v, pk[:1], pv[:1], gate[0], backend=backend)
    expanded = zero_gate_attention(
        q, k, v, pk[:1].expand(4, -1, -1, -1), pv[:1].expand(4, -1, -1, -1), gate[0], backend=backend
    )
    same(shared, expanded)
    none = zero_gate_attention(q, k, v, pk, pv, gate, prefix_index=torch.full((4,), -1), backend=backend)
    same(none, zero_gate_attention(q, k, v, None, None, None, backend=backend))


def test_rows_that_see_nothing_get_only_the_prefix(backend: str) -> None:
    q, k, v, pk, pv, gate = tensors(Case(heads_q=4, heads_kv=4))
    prefix = gate[:, None, None] * F.scaled_dot_product_attention(q, pk.expand(2, -1, -1, -1), pv.expand(2, -1, -1, -1))
    nothing = torch.zeros(2, dtype=torch.int32)
    for arguments in ({"key_end": nothing}, {"attn_mask": torch.zeros(33, 33, dtype=torch.bool)},
                      {"attn_mask": torch.full((33, 33), -torch.inf)}):  # fmt: skip
        output = zero_gate_attention(q, k, v, pk, pv, gate, backend=backend, **arguments)
        torch.testing.assert_close(output, prefix)
    empty = zero_gate_attention(q, k[:, :, :0], v[:, :, :0], pk, pv, gate, backend=backend)
    torch.testing.assert_close(empty, prefix)


def with_gradients(backend: str, inputs: list[torch.Tensor], **arguments: object) -> list[torch.Tensor]:
    """[output, the six gradients]"""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    output = zero_gate_attention(*leaves, backend=backend, **arguments)
    doutput = torch.linspace(-1, 1, output.numel()).view(output.shape)
    return [output.detach(), *torch.autograd.grad(output, leaves, doutput)]


def test_keys_outside_of_the_window_are_not_read(backend: str) -> None:
    """They may be memory nobody wrote: the rest of a cache, the padding of a batch."""
    q, k, v, pk, pv, gate = tensors(Case(seq_q=9, seq_k=140))
    arguments = {"key_start": torch.tensor([3, 70]), "key_end": torch.tensor([131, 75]), "is_causal": True}
    clean = with_gradients(backend, [q, k, v, pk, pv, gate], **arguments)
    for b, (start, end) in enumerate(((3, 131), (70, 75))):
        for tensor in (k, v):
            tensor[b, :, :start] = tensor[b, :, end:] = torch.nan
    poisoned = with_gradients(backend, [q, k, v, pk, pv, gate], **arguments)
    assert all(torch.equal(a, b) for a, b in zip(clean, poisoned, strict=True))
    decoded = zero_gate_decode(
        q, k, v, arguments["key_end"], pk, pv, gate, key_start=arguments["key_start"], backend=backend
    )
    torch.testing.assert_close(decoded, clean[0])


def test_tokens_after_the_last_sequence_are_not_read(backend: str) -> None:
    q, k, v = (torch.randn(tokens, 2, 16) for tokens in (80, 140, 140))
    pk, pv, gate = torch.randn(1, 2, 5, 16), torch.randn(1, 2, 5, 16), torch.randn(2)
    bounds = {"cu_seqlens_q": torch.tensor([0, 7, 7, 75]), "cu_seqlens_k": torch.tensor([0, 9, 20, 131])}
    results = []
    for filler in (0.0, torch.nan):
        q[75:], k[131:], v[131:] = filler, filler, filler
        leaves = [tensor.detach().clone().requires_grad_() for tensor in (q, k, v, pk, pv, gate)]
        output = zero_gate_attention_varlen(
            *leaves, **bounds, max_seqlen_q=68, max_seqlen_k=111, is_causal=True, backend=backend
        )
        gradients = torch.autograd.grad(output[:75].square().sum(), leaves)
        rows = (75, 75, 131, 131, None, None, None)
        results.append([r[:n] for r, n in zip((output, *gradients), rows, strict=True)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_index_minus_one_reads_no_prefix(backend: str) -> None:
    q, k, v, pk, pv, gate = tensors(Case(batch=2, prefix="table", gate="prefix"))
    for tensor in (pk, pv, gate):
        tensor.fill_(torch.nan)
    output, *gradients = with_gradients(backend, [q, k, v, pk, pv, gate], prefix_index=torch.tensor([-1, -1]))
    assert torch.equal(output, zero_gate_attention(q, k, v, None, None, None, backend=backend))
    assert not any(gradient.isnan().any() for gradient in gradients)
    assert all((gradient == 0).all() for gradient in gradients[3:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_huge_finite_mask_gives_no_nan(backend: str, dtype: torch.dtype) -> None:
    """Models mask with finfo.min, often of a wider dtype: there it overflows to -inf, and whole rows with it."""
    q, k, v, pk, pv, gate = tensors(Case(), dtype)
    for huge in (-1e30, torch.finfo(torch.float32).min, -1e300):
        mask = torch.zeros(33, 33, dtype=torch.float64)
        mask[:5] = huge
        mask[5:, 20:] = huge
        output = zero_gate_attention(q, k, v, pk, pv, gate, attn_mask=mask, backend=backend)
        assert not output.isnan().any()
        hidden = zero_gate_attention(q, k[:, :, :20], v[:, :, :20], pk, pv, gate, backend=backend)
        torch.testing.assert_close(output[:, :, 5:], hidden[:, :, 5:])


def test_nan_in_a_mask_or_an_input_shows(backend: str) -> None:
    q, k, v, pk, pv, gate = tensors(Case())
    mask = torch.zeros(33, 33)
    mask[4, 2] = torch.nan
    output = zero_gate_attention(q, k, v, pk, pv, gate, attn_mask=mask, backend=backend)
    assert output[:, :, 4].isnan().all() and not output[:, :, 5:].isnan().any()
    q[0, 1, 7, 3] = torch.nan
    output = zero_gate_attention(q, k, v, pk, pv, gate, is_causal=True, backend=backend)
    assert output[0, 1, 7].isnan().all() and output.isnan().sum() == output.shape[-1]
    assert zero_gate_decode(q[:, :, 7:8], k, v, None, pk, pv, gate, backend=backend)[0, 1].isnan().all()


def test_nan_in_an_input_shows_in_the_gradients(backend: str) -> None:
    q, k, v, pk, pv, gate = tensors(Case())
    q[0, 1, 7, 3] = torch.nan
    _, dquery, dkey, dvalue, *_ = with_gradients(backend, [q, k, v, pk, pv, gate], is_causal=True)
    kv_head = 1 // (q.shape[1] // k.shape[1])
    assert dquery[0, 1, 7].isnan().all()
    for gradient in (dkey, dvalue):
        assert gradient[0, kv_head, :8].isnan().all() and not gradient[1:].isnan().any()


def test_nan_in_a_key_that_a_mask_hides_does_not_show(backend: str) -> None:
    """Hidden by False or by -inf is hidden, whatever the key holds. 33 queries: an odd number, none of any block."""
    q, k, v, pk, pv, gate = tensors(Case(seq_q=33, seq_k=140))
    hides = torch.ones(33, 140, dtype=torch.bool)
    hides[:, 3] = hides[:, 130] = False
    hides[5] = False
    for mask in (hides, torch.zeros(33, 140).masked_fill(~hides, -torch.inf)):
        results = []
        for content in (0.0, torch.nan, torch.inf):
            k[:, :, 3], k[:, :, 130] = content, content
            results.append(with_gradients(backend, [q, k, v, pk, pv, gate], attn_mask=mask))
        for result in results[1:]:  # dquery is 0 times the key
            assert all(torch.equal(results[0][i], result[i]) for i in (0, 2, 3, 4, 5, 6))


ONE_KEY = {
    "window": {"key_start": torch.tensor([100, 3]), "key_end": torch.tensor([101, 4])},
    "bool": {"attn_mask": torch.arange(200) == torch.tensor([0, 1, 63, 64, 100, 127, 128, 190, 199])[:, None]},
}
ONE_KEY["-inf"] = {"attn_mask": torch.where(ONE_KEY["bool"]["attn_mask"], 0.5, -torch.inf)}
ONE_KEY["finfo.min"] = {"attn_mask": torch.where(ONE_KEY["bool"]["attn_mask"], 0.5, torch.finfo(torch.float32).min)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("hidden", ONE_KEY)
@pytest.mark.parametrize("head_dim", [1, 64])
def test_a_row_that_sees_one_key_has_no_gradient_of_its_scores(
    backend: str, hidden: str, dtype: torch.dtype, head_dim: int
) -> None:
    """Its softmax is 1 whatever the scores are: dkey is 0, and dquery what the prefix makes it, to the last bit."""
    inputs = tensors(Case(heads_q=4, heads_kv=2, seq_q=9, seq_k=200, head_dim=head_dim), dtype)
    _, dquery, dkey, dvalue, *_ = with_gradients(backend, inputs, **ONE_KEY[hidden])
    assert (dkey == 0).all() and (dvalue != 0).any()
    only_prefix = {"attn_mask": torch.zeros(9, 200, dtype=torch.bool)}
    assert torch.equal(dquery, with_gradients(backend, inputs, **only_prefix)[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_first_causal_row_has_no_gradient_of_its_scores(backend: str, dtype: torch.dtype) -> None:
    q, k, v, *_ = tensors(Case(seq_q=70, seq_k=70, head_dim=64), dtype)
    leaves = [tensor.requires_grad_() for tensor in (q, k, v)]
    output = zero_gate_attention(*leaves, None, None, None, is_causal=True, backend=backend)
    dquery, *_ = torch.autograd.grad(output, leaves, torch.randn_like(output))
    assert (dquery[:, :, 0] == 0).all() and (dquery[:, :, 1:].abs().amax(dim=-1) > 0).all()


def test_tokens_after_the_last_sequence_get_zeros(backend: str) -> None:
    leaves = [torch.randn(10, 2, 16, requires_grad=True) for _ in range(3)]
    bounds = torch.tensor([0, 3, 7])
    torch.use_deterministic_algorithms(True)  # fills new tensors with NaN
    try:
        output = zero_gate_attention_varlen(
            *leaves, None, None, None, cu_seqlens_q=bounds, cu_seqlens_k=bounds, max_seqlen_q=4, max_seqlen_k=4,
            backend=backend,
        )  # fmt: skip
        gradients = torch.autograd.grad(output.square().sum(), leaves)
    finally:
        torch.use_deterministic_algorithms(False)
    for result in (output.detach(), *gradients):
        assert (result[7:] == 0).all() and (result[:7] != 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_prefix_that_nobody_uses_may_be_nan(backend: str, dtype: torch.dtype) -> None:
    """Its sequence has no query: its gradients are zero, and nobody else's are NaN."""
    case = Case(heads_q=2, heads_kv=1, head_dim=64, lengths=((5, 5), (0, 3)), prefix="sequence", gate="prefix")
    problem = make_problem(case, dtype)
    for name in ("prefix_key", "prefix_value"):
        problem.tensors[name].data[1] = torch.nan
    output = problem.forward(backend)
    output.backward(problem.doutput)
    assert output.isfinite().all()
    for name, tensor in problem.tensors.items():
        assert tensor.grad.isfinite().all(), name
        if name in ("prefix_key", "prefix_value", "gate"):
            assert (tensor.grad[1] == 0).all(), name
            assert (tensor.grad[0] != 0).any(), name
