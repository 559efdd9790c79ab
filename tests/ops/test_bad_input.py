"""Bad input raises an error that names the argument, what was expected and what came: from the functions and the raw ops."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llama_adapter_kernels import zero_gate_attention, zero_gate_attention_varlen, zero_gate_decode


def good() -> dict[str, Any]:
    """A valid call: 2 sequences, 4/2 heads, 5 tokens, head_dim 8, 3 prefix slots."""
    return {
        "query": torch.randn(2, 4, 5, 8), "key": torch.randn(2, 2, 5, 8), "value": torch.randn(2, 2, 5, 8),
        "prefix_key": torch.randn(1, 2, 3, 8), "prefix_value": torch.randn(1, 2, 3, 8), "gate": torch.randn(4),
    }  # fmt: skip


PADDED = [
    ({"query": torch.randn(4, 5, 8)}, r"query: expected 4 dimensions .*, got shape \[4, 5, 8\]"),
    ({"query": torch.randn(2, 3, 5, 8)}, "key: expected a number of heads that divides the 3 of query, got 2"),
    ({"query": torch.randn(3, 4, 5, 8)}, "key: expected the batch size 3 of query, got 2"),
    ({"query": torch.randn(2, 4, 5, 9)}, "key: expected the head_dim 9 of query, got 8"),
    ({"key": torch.randn(2, 2, 6, 8)}, r"value: expected the shape \[2, 2, 6, 8\] of key, got \[2, 2, 5, 8\]"),
    ({"key": torch.randn(2, 2, 5, 8).half()}, "key: expected the dtype torch.float32 of query, got torch.float16"),
    ({"value": torch.randn(2, 2, 5, 8, device="meta")}, "value: expected the device cpu of query, got meta"),
    ({"query": torch.ones(2, 4, 5, 8, dtype=torch.int32)}, "key: expected the dtype torch.int32"),
    ({"prefix_key": None}, "expected all three or None for all three"),
    ({"prefix_key": torch.randn(3, 2, 3, 8), "prefix_value": torch.randn(3, 2, 3, 8)},
     r"prefix_key: expected a first dimension of 1 \(shared\) or 2 \(one per sequence\), got 3"),
    ({"prefix_key": torch.randn(1, 4, 3, 8)}, r"prefix_key: expected shape \[A, 2, P, 8\], got \[1, 4, 3, 8\]"),
    ({"prefix_value": torch.randn(1, 2, 4, 8)}, r"prefix_value: expected the shape \[1, 2, 3, 8\] of prefix_key"),
    ({"prefix_value": torch.randn(1, 2, 3, 8).double()}, "prefix_value: expected the dtype torch.float32 of query"),
    ({"gate": torch.randn(5)}, r"gate: expected a scalar, \[4\] .* got shape \[5\]"),
    ({"gate": torch.ones(4, dtype=torch.int64)}, "gate: expected float32, bfloat16, float16 or float64, got torch.int64"),
    ({"prefix_index": torch.tensor([0, 1])}, "prefix_index: expected values from -1 to 0, got 1 at position 1"),
    ({"prefix_index": torch.tensor([0, -2])}, "prefix_index: expected values from -1 to 0, got -2 at position 1"),
    ({"prefix_index": torch.tensor([0])}, r"prefix_index: expected shape \[2\], got \[1\]"),
    ({"prefix_index": torch.tensor([0.0, 0.0])}, "prefix_index: expected int32 or int64, got torch.float32"),
    ({"key_end": torch.tensor([5, 6])}, "key_end: expected values from 0 to 5, got 6 at position 1"),
    ({"key_end": torch.tensor([5, 2**32 + 3])}, "key_end: expected values from 0 to 5, got 4294967299 at position 1"),
    ({"key_start": torch.tensor([0, -(2**40)])}, "key_start: expected values from 0 to 5, got -1099511627776"),
    ({"prefix_index": torch.tensor([2**33, 0])}, "prefix_index: expected values from -1 to 0, got 8589934592"),
    ({"key_start": torch.tensor([-1, 0])}, "key_start: expected values from 0 to 5, got -1 at position 0"),
    ({"key_end": torch.tensor([[5, 5]])}, r"key_end: expected shape \[2\], got \[1, 2\]"),
    ({"attn_mask": torch.ones(5, 4, dtype=torch.bool)}, r"attn_mask: expected a shape that broadcasts to \[2, 4, 5, 5\]"),
    ({"attn_mask": torch.ones(5, 5, dtype=torch.int32)}, "attn_mask: expected bool, float32, bfloat16"),
    ({"attn_mask": torch.zeros(5, 5, requires_grad=True)}, "attn_mask: expected a mask without gradient"),
    ({"query": torch.randn(2, 0, 5, 8)}, r"query: expected at least one head, got shape \[2, 0, 5, 8\]"),
    ({"query": None}, "query: expected a tensor, got NoneType"),
    ({"gate": 0.5}, "gate: expected a tensor, got float"),
    ({"key_end": 5}, "key_end: expected a tensor, got int"),
    ({"prefix_index": [0, 0]}, "prefix_index: expected a tensor, got list"),
    ({"gate": torch.randn(4).to(torch.float8_e4m3fn)}, "gate: expected float32, .* got torch.float8_e4m3fn"),
    ({"attn_mask": torch.zeros(5, 5).to(torch.float8_e5m2)}, "attn_mask: expected bool, .* got torch.float8_e5m2"),
    ({"is_causal": None}, "is_causal: expected True or False, got None"),
    ({"is_causal": 1}, "is_causal: expected True or False, got 1"),
    ({"is_causal": torch.tensor(True)}, "is_causal: expected True or False, got a tensor of True"),
    ({"scale": "0.5"}, "scale: expected a number, got '0.5'"),
    ({"scale": True}, "scale: expected a number, got True"),
    ({"scale": 1j}, "scale: expected a number, got a complex"),
    ({"scale": float("nan")}, "scale: expected a finite number, got nan"),
    ({"scale": float("inf")}, "scale: expected a finite number, got inf"),
    ({"scale": torch.ones(2)}, r"scale: expected a number, got a tensor of shape \[2\] and dtype torch.float32"),
    ({"scale": torch.tensor(0.5, requires_grad=True)}, "scale: expected a number, got a tensor that requires a gradient"),
    ({"key": torch.randn(2, 2, 5, 8).to_sparse()}, "key: expected a dense tensor .* got the layout torch.sparse_coo"),
    ({"value": torch.randn(2, 2, 5, 8).to_mkldnn()}, "value: expected a dense tensor .* got the layout torch._mkldnn"),
    ({"query": torch.nested.nested_tensor([torch.randn(4, 5, 8)] * 2, layout=torch.jagged)},
     "query: expected a dense tensor .* got a nested tensor"),
    ({"gate": torch.ones(4).to_sparse()}, "gate: expected a dense tensor"),
    ({"attn_mask": torch.ones(5, 5).to_sparse()}, "attn_mask: expected a dense tensor .* torch.sparse_coo"),
    ({"key_end": torch.tensor([5, 5]).to_sparse()}, "key_end: expected a dense tensor"),
    ({"backend": "tpu"}, "backend: expected one of cpu, cuda, triton, reference, got 'tpu'"),
]  # fmt: skip


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("change", "message"), PADDED, ids=lambda value: value if isinstance(value, str) else "")
def test_padded(change: dict[str, Any], message: str, backend: str) -> None:
    with pytest.raises((ValueError, RuntimeError), match=message):
        zero_gate_attention(**{"backend": backend} | good() | change)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cu_seqlens_q": torch.tensor([0, 3, 2, 5])}, "cu_seqlens_q: expected increasing offsets, got 2 after 3"),
        (
            {"cu_seqlens_k": torch.tensor([0, 3, 6, 9])},
            "cu_seqlens_k: expected to end within the 7 packed tokens, got 9",
        ),
        ({"cu_seqlens_q": torch.tensor([1, 2, 4, 7])}, "cu_seqlens_q: expected to begin with 0, got 1"),
        ({"cu_seqlens_q": torch.tensor([0, 7])}, r"cu_seqlens_k: expected shape \[2\], got \[4\]"),
        ({"max_seqlen_q": 2}, "max_seqlen_q: expected at least 3, the length of sequence 2, got 2"),
        ({"max_seqlen_k": -1}, "max_seqlen_k: expected an integer >= 0, got -1"),
        (
            {"cu_seqlens_q": torch.tensor([2**32, 2**32 + 2, 4, 7])},
            "cu_seqlens_q: expected to begin with 0, got 4294967296",
        ),
        (
            {"cu_seqlens_k": torch.tensor([0, 2, 4, 2**40])},
            "max_seqlen_k: expected at least 1099511627772, the length of",
        ),
        ({"max_seqlen_q": torch.tensor(5.5)}, "max_seqlen_q: expected an integer >= 0, got a tensor of 5.5"),
        ({"max_seqlen_q": 5.0}, "max_seqlen_q: expected an integer >= 0, got 5.0"),
        ({"max_seqlen_q": True}, "max_seqlen_q: expected an integer >= 0, got True"),
        ({"max_seqlen_q": None}, "max_seqlen_q: expected an integer >= 0, got None"),
        (
            {"max_seqlen_k": torch.tensor([3, 3])},
            r"max_seqlen_k: expected an integer >= 0, got a tensor of shape \[2\]",
        ),
        ({"max_seqlen_k": 2**63}, "max_seqlen_k: expected an integer >= 0, got 9223372036854775808"),
        ({"is_causal": None}, "is_causal: expected True or False, got None"),
        ({"scale": torch.tensor(1.0, requires_grad=True)}, "scale: expected a number, got a tensor that requires"),
        (
            {"query": torch.nested.nested_tensor([torch.randn(7, 4, 8)], layout=torch.jagged)},
            "query: expected a dense tensor",
        ),
        ({"cu_seqlens_k": [0, 2, 4, 7]}, "cu_seqlens_k: expected a tensor, got list"),
        ({"query": torch.randn(1, 4, 7, 8)}, r"query: expected 3 dimensions \[T, H, D\]"),
        (
            {"prefix_key": torch.randn(2, 2, 3, 8), "prefix_value": torch.randn(2, 2, 3, 8)},
            "prefix_key: expected a first",
        ),
    ],
)
def test_packed(change: dict[str, Any], message: str, backend: str) -> None:
    arguments = {
        "query": torch.randn(7, 4, 8), "key": torch.randn(7, 2, 8), "value": torch.randn(7, 2, 8),
        "prefix_key": torch.randn(1, 2, 3, 8), "prefix_value": torch.randn(1, 2, 3, 8), "gate": torch.randn(4),
        "cu_seqlens_q": torch.tensor([0, 2, 4, 7]), "cu_seqlens_k": torch.tensor([0, 2, 4, 7]), "max_seqlen_q": 3,
        "max_seqlen_k": 3, "backend": backend,
    }  # fmt: skip
    with pytest.raises((ValueError, RuntimeError), match=message):
        zero_gate_attention_varlen(**arguments | change)


@pytest.mark.parametrize("scale", [0.25, torch.tensor(0.25), torch.tensor(0.25, dtype=torch.float64), np.float32(0.25)])
def test_numbers_of_any_kind_are_scales_and_counts(scale: Any) -> None:
    tensors = good()
    assert torch.equal(zero_gate_attention(**tensors, scale=scale), zero_gate_attention(**tensors, scale=0.25))
    with torch.no_grad():  # where no gradient is asked for, none is lost
        parameter = torch.tensor(0.25, requires_grad=True)
        assert torch.equal(zero_gate_attention(**tensors, scale=parameter), zero_gate_attention(**tensors, scale=0.25))
    q, k, v = (tensors[name][0].transpose(0, 1) for name in ("query", "key", "value"))
    results = [
        zero_gate_attention_varlen(
            q, k, v, None, None, None, cu_seqlens_q=torch.tensor([0, 5]), cu_seqlens_k=torch.tensor([0, 5]),
            max_seqlen_q=longest, max_seqlen_k=longest,
        )
        for longest in (5, torch.tensor(5), np.int64(5))
    ]  # fmt: skip
    assert all(torch.equal(result, results[0]) for result in results)


def test_a_device_without_a_backend_is_named() -> None:
    with pytest.raises(RuntimeError, match=r"no backend fits query .* on meta: cpu: runs on cpu, not on meta"):
        zero_gate_attention(*(tensor.to("meta") for tensor in good().values()), backend="cpu")


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_generous_bound_on_the_lengths_is_no_mistake(backend: str) -> None:
    q, k = torch.randn(7, 4, 8), torch.randn(7, 2, 8)
    offsets = torch.tensor([0, 3, 7])
    exact, generous = (
        zero_gate_attention_varlen(
            q, k, k, None, None, None, cu_seqlens_q=offsets, cu_seqlens_k=offsets, max_seqlen_q=bound,
            max_seqlen_k=bound, backend=backend,
        )
        for bound in (4, 2**40)
    )  # fmt: skip
    assert torch.equal(exact, generous)


def test_decode_has_no_gradient() -> None:
    q, k, v, pk, pv, gate = good().values()
    with pytest.raises(ValueError, match="gate: expected no gradient"):
        zero_gate_decode(q, k, v, None, pk, pv, gate.requires_grad_())


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key_cache": torch.randn(2, 5, 8)}, r"key_cache: expected 4 dimensions .*, got shape \[2, 5, 8\]"),
        ({"key_cache": torch.randn(2, 3, 5, 8)}, "key_cache: expected a number of heads that divides the 4 of query"),
        ({"key_cache": torch.randn(3, 2, 5, 8)}, "key_cache: expected the batch size 2 of query, got 3"),
        ({"key_cache": torch.randn(2, 2, 5, 7)}, "key_cache: expected the head_dim 8 of query, got 7"),
        ({"value_cache": torch.randn(2, 2, 4, 8)}, r"value_cache: expected the shape \[2, 2, 5, 8\] of key_cache"),
        ({"value_cache": torch.randn(2, 2, 5, 8).half()}, "value_cache: expected the dtype torch.float32 of query"),
        ({"cache_lengths": torch.tensor([1, 9])}, "cache_lengths: expected values from 0 to 5, got 9 at position 1"),
        ({"cache_lengths": torch.tensor([-1, 1])}, "cache_lengths: expected values from 0 to 5, got -1 at position 0"),
        ({"cache_lengths": torch.tensor([2**32 + 3, 1])}, "cache_lengths: expected values from 0 to 5, got 4294967299"),
        ({"cache_lengths": torch.tensor([1])}, r"cache_lengths: expected shape \[2\], got \[1\]"),
        ({"cache_lengths": 5}, "cache_lengths: expected a tensor, got int"),
        ({"key_start": torch.tensor([6, 0])}, "key_start: expected values from 0 to 5, got 6 at position 0"),
        ({"key_start": torch.tensor([2**40, 0])}, "key_start: expected values from 0 to 5, got 1099511627776"),
        ({"scale": None, "key_cache": torch.randn(2, 2, 5, 8).to_sparse()}, "key_cache: expected a dense tensor"),
        ({"scale": "x"}, "scale: expected a number, got 'x'"),
    ],
)
def test_decode(change: dict[str, Any], message: str, backend: str) -> None:
    """Named as the caller named it, not as the functions beneath do."""
    q, k, v, pk, pv, gate = good().values()
    arguments = {"query": q, "key_cache": k, "value_cache": v, "cache_lengths": None, "prefix_key": pk,
                 "prefix_value": pv, "gate": gate}  # fmt: skip
    with pytest.raises((ValueError, RuntimeError), match=message):
        zero_gate_decode(**arguments | change, backend=backend)


def raw(**change: Any) -> list[Any]:
    a = good() | {"gate": torch.randn(1, 4)} | dict.fromkeys(
        ("attn_mask", "key_start", "key_end", "prefix_index", "cu_seqlens_q", "cu_seqlens_k")
    )  # fmt: skip
    return [*(a | change).values(), 0, 0, 0.3, True]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.randn(4, 5, 8)}, "query: expected 4 dimensions"),
        ({"key": torch.randn(2, 2, 5, 7)}, "key: expected shape"),
        ({"key": torch.randn(2, 3, 5, 8), "value": torch.randn(2, 3, 5, 8)}, "key: expected a number of heads"),
        ({"value": torch.randn(2, 2, 4, 8)}, "value: expected shape"),
        ({"value": torch.randn(2, 2, 5, 8).double()}, "value: expected the dtype of query, Float, got Double"),
        ({"prefix_value": None}, "expected all three or none"),
        ({"prefix_key": torch.randn(3, 2, 3, 8), "prefix_value": torch.randn(3, 2, 3, 8), "gate": torch.randn(3, 4)},
         "prefix_key: expected a first dimension of 1 or 2"),
        ({"gate": torch.randn(4)}, "gate: expected shape"),
        ({"gate": torch.randn(1, 4).half()}, "gate: expected float32"),
        ({"attn_mask": torch.ones(5, 5, dtype=torch.bool)}, "attn_mask: expected shape"),
        ({"key_end": torch.tensor([5, 6], dtype=torch.int32)}, "key_end: expected values from 0 to 5, got 6"),
        ({"key_end": torch.tensor([5, 5])}, "key_end: expected int32"),
        ({"prefix_index": torch.tensor([7, 0], dtype=torch.int32)}, "prefix_index: expected values from -1 to 0, got 7"),
        ({"cu_seqlens_q": torch.tensor([0, 5], dtype=torch.int32)}, "expected both or neither"),
    ],
)  # fmt: skip
def test_raw_op(change: dict[str, Tensor | None], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.llama_adapter_kernels.forward(*raw(**change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"doutput": torch.randn(2, 4, 4, 8)}, r"doutput: expected shape \[2, 4, 5, 8\], got \[2, 4, 4, 8\]"),
        ({"doutput": torch.randn(2, 4, 5, 8).double()}, "doutput: expected the dtype of query"),
        ({"output": torch.randn(8)}, "output: expected shape"),
        ({"logsumexp": torch.randn(2, 4, 5).half()}, "logsumexp: expected what forward returned"),
        ({"logsumexp": torch.randn(2, 4, 6)}, r"logsumexp: expected shape \[2, 4, 5\], got \[2, 4, 6\]"),
        ({"logsumexp": torch.randn(2, 5, 4).transpose(1, 2)}, "logsumexp: expected a contiguous tensor"),
        ({"key": torch.randn(2, 2, 5, 7)}, "key: expected shape"),
    ],
)
def test_raw_backward(change: dict[str, Tensor], message: str) -> None:
    inputs = raw()
    output, logsumexp = torch.ops.llama_adapter_kernels.forward(*inputs)
    arguments = {"doutput": output, **good(), "gate": inputs[5], "output": output, "logsumexp": logsumexp} | change
    with pytest.raises(RuntimeError, match=message):
        torch.ops.llama_adapter_kernels.backward(*arguments.values(), *inputs[6:], True, True, True, False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.randn(2, 4, 8)}, "query: expected 4 dimensions"),
        ({"value": torch.randn(2, 2, 4, 8)}, "value: expected shape"),
        (
            {"key_end": torch.tensor([5, -1], dtype=torch.int32)},
            "key_end: expected values from 0 to 5, got -1 at position 1",
        ),
        (
            {"prefix_index": torch.tensor([1, 0], dtype=torch.int32)},
            "prefix_index: expected values from -1 to 0, got 1",
        ),
    ],
)
def test_raw_decode(change: dict[str, Tensor], message: str) -> None:
    lengths = dict.fromkeys(("key_start", "key_end", "prefix_index"))
    arguments = good() | {"gate": torch.randn(1, 4)} | lengths | change
    with pytest.raises(RuntimeError, match=message):
        torch.ops.llama_adapter_kernels.decode(*arguments.values(), 0.3, True)
