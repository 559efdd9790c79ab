"""What must hold whatever the inputs: identities of the operation, for every backend that runs on this CPU."""

import pytest
import torch
import torch.nn.functional as F

from llama_adapter_kernels import zero_gate_attention, zero_gate_attention_varlen, zero_gate_decode
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
    two = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    two = two + gate_value * F.scaled_dot_product_attention(
        q, pk.expand(2, -1, -1, -1), pv.expand(2, -1, -1, -1), enable_gqa=True
    )
    one = zero_gate_attention(q, k, v, pk, pv, torch.tensor(gate_value), is_causal=True, backend=backend)
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
    q, k, v, pk, pv, gate = tensors(Case(batch=4, prefix="table", gate="prefix"))
    index = torch.tensor([2, 0, 2, 1])
    chosen = zero_gate_attention(q, k, v, pk, pv, gate, prefix_index=index, backend=backend)
    gathered = zero_gate_attention(q, k, v, pk[index], pv[index], gate[index], backend=backend)
    assert torch.equal(chosen, gathered)
    shared = zero_gate_attention(q, k, v, pk[:1], pv[:1], gate[0], backend=backend)
    expanded = zero_gate_attention(
        q, k, v, pk[:1].expand(4, -1, -1, -1), pv[:1].expand(4, -1, -1, -1), gate[0], backend=backend
    )
    assert torch.equal(shared, expanded)
    none = zero_gate_attention(q, k, v, pk, pv, gate, prefix_index=torch.full((4,), -1), backend=backend)
    assert torch.equal(none, zero_gate_attention(q, k, v, None, None, None, backend=backend))


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
