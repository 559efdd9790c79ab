"""NaN of every kind, and tensors that begin at any element, per instruction set."""

import pytest
import torch

from llama_adapter_kernels import zero_gate_attention, zero_gate_decode
from llama_adapter_kernels.testing import Case, make_problem

NAMES = ("query", "key", "value", "prefix_key", "prefix_value", "gate")
# Per dtype an integer of its size, and where its exponent ends: a NaN is all bits from there up and any below.
BITS = {torch.float32: (torch.int32, 23, 32), torch.float64: (torch.int64, 52, 64),
        torch.bfloat16: (torch.int16, 7, 16), torch.float16: (torch.int16, 10, 16)}  # fmt: skip


def every_nan(dtype: torch.dtype) -> torch.Tensor:
    """NaN with each payload bit by itself, with all, and negative: quiet ones, as arithmetic makes and keeps them."""
    integer, mantissa, size = BITS[dtype]
    quiet = (1 << (size - 1)) - (1 << (mantissa - 1))
    patterns = [quiet, quiet | ((1 << mantissa) - 1), *(quiet | 1 << bit for bit in range(mantissa - 1))]
    signed = [p - (1 << (size - 1)) for p in patterns]  # the same with the sign bit, as two's complement
    nans = torch.tensor(patterns + signed, dtype=integer).view(dtype)
    assert nans.isnan().all()
    return nans


@pytest.mark.parametrize("dtype", BITS, ids=str)
@pytest.mark.parametrize("name", [*NAMES, "attn_mask"])
def test_every_nan_shows_where_it_shows_in_eager_code(name: str, dtype: torch.dtype, isa: str) -> None:
    problem = make_problem(Case(batch=1, heads_q=2, heads_kv=1, seq_q=9, seq_k=70, head_dim=8, is_causal=False), dtype)
    inputs = {n: t.detach() for n, t in problem.tensors.items()}
    mask = torch.zeros(9, 70, dtype=torch.float32 if dtype == torch.bfloat16 else dtype)  # more bits for a payload
    poisoned = mask if name == "attn_mask" else inputs[name]

    def where_nan(backend: str) -> list[torch.Tensor]:
        leaves = {n: t.clone().requires_grad_() for n, t in inputs.items()}
        output = zero_gate_attention(**leaves, attn_mask=mask, backend=backend)
        results = [output, *torch.autograd.grad(output, list(leaves.values()), problem.doutput)]
        if name != "attn_mask":
            q, k, v, *prefix = inputs.values()
            results.append(zero_gate_decode(q[:, :, -2:], k, v, None, *prefix, backend=backend))
        return [result.isnan() for result in results]

    in_eager_code = None
    for nan in every_nan(poisoned.dtype):
        poisoned.flatten()[-1:].copy_(nan)  # the last query, key, slot or head
        in_eager_code = in_eager_code or where_nan("reference")
        assert in_eager_code[0].any()
        bits = f"{nan.view(BITS[nan.dtype][0]).item():x}"
        assert all(torch.equal(*pair) for pair in zip(in_eager_code, where_nan("cpu"), strict=True)), bits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_rows_that_begin_at_any_element(dtype: torch.dtype, isa: str) -> None:
    """Views at odd offsets with odd strides: the same bits as of copies, and no load of more than an element's alignment."""
    problem = make_problem(Case(batch=1, heads_q=2, heads_kv=1, seq_q=70, seq_k=70, head_dim=64), dtype)
    results = []
    for shift in (0, 1):
        leaves = {}
        for name, tensor in problem.tensors.items():
            view = tensor.detach()
            if shift and name != "gate":
                view = torch.zeros(*tensor.shape[:-1], tensor.shape[-1] + 3, dtype=dtype)[
                    ..., shift : shift + tensor.shape[-1]
                ]
                view.copy_(tensor.detach())
            leaves[name] = view.requires_grad_()
        output = zero_gate_attention(**leaves, is_causal=True, backend="cpu")
        gradients = torch.autograd.grad(output, list(leaves.values()), problem.doutput)
        with torch.no_grad():
            q, *rest = leaves.values()
            decoded = zero_gate_decode(q[:, :, -1:], *rest[:2], None, *rest[2:], backend="cpu")
        results.append([output, *gradients, decoded])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_log_sum_exp_of_rows_that_see_few_keys_or_none(dtype: torch.dtype, isa: str) -> None:
    """Minus infinity where a row sees none: by key_end in the second sequence, by causality at the top of the first."""
    q, k, v = (torch.randn(2, 2, rows, 16).to(dtype) for rows in (9, 5, 5))
    key_end = torch.tensor([5, 0], dtype=torch.int32)
    arguments = [None, None, None, None, None, key_end, None, None, None, 0, 0, 0.25, True]
    _, logsumexp = torch.ops.llama_adapter_kernels.forward(q, k, v, *arguments)
    hidden = torch.ones(9, 5, dtype=torch.bool).triu(5 - 9 + 1)
    exact = (0.25 * q.double() @ k.double().mT).masked_fill(hidden, -torch.inf).logsumexp(dim=-1)
    exact[1] = -torch.inf
    assert torch.equal(logsumexp.isneginf(), exact.isneginf()) and exact[0].isneginf().sum() == 2 * 4
    torch.testing.assert_close(logsumexp.double(), exact, rtol=1e-6, atol=1e-6)
