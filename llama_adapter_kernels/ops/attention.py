"""The public operation: zero-init attention over padded batches, packed sequences and key/value caches."""

from typing import Any

import torch
from torch import Tensor

from llama_adapter_kernels.ops import checks, reference, registration, transforms
from llama_adapter_kernels.ops.arguments import Inputs
from llama_adapter_kernels.ops.backends import choose
from llama_adapter_kernels.ops.order import Pass


def zero_gate_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor | None,
    prefix_value: Tensor | None,
    gate: Tensor | None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    attn_mask: Tensor | None = None,
    key_start: Tensor | None = None,
    key_end: Tensor | None = None,
    prefix_index: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """`softmax(scale Q K^T) V + gate * softmax(scale Q Kp^T) Vp`, fused (arXiv 2303.16199, zero-init attention).

    Args:
        query: [B, Hq, Sq, D], float32, bfloat16, float16 or float64 (float64: backends cpu and reference). Rotary
            embedding is already applied. Any strides; no copy is made as long as the stride over D is 1.
        key, value: [B, Hkv, Sk, D]; Hkv divides Hq (grouped queries: query head h uses key head h // (Hq / Hkv)).
        prefix_key, prefix_value: [A, Hkv, P, D], not rotated. A = 1: shared by the batch; A = B: one per sequence;
            any A with `prefix_index`. P = 0, or None for all three of prefix_key, prefix_value and gate: plain attention.
        gate: scalar, [Hq] or [A, Hq], float32, bfloat16, float16 or float64; multiplies as it is (apply tanh before).
        is_causal: bottom-right aligned: query i sees keys j <= i + (Sk - Sq), or + (key_end[b] - Sq) with `key_end`.
        scale: multiplies both score matrices, a number without gradient; default 1 / sqrt(D).
        attn_mask: bool (True = attend) or floating (added to the scaled scores), broadcastable to [B, Hq, Sq, Sk],
            without gradient. Masks words, never the prefix; may take a slower path than key_start and key_end. Hide
            keys by False or -inf: where every key of a row has a huge finite number (finfo.min) the row is a mean of
            all values, and its gradient too large (the saved log-sum-exp has no digits left for their count).
        key_start, key_end: [B] int32 or int64, the window [key_start, key_end) of valid keys of each sequence.
        prefix_index: [B] int32 or int64, the entry of the prefix table (0..A-1) each sequence uses; -1: no prefix.
        backend: "cpu", "cuda", "triton" or "reference"; default: `use_backend`'s, or the first that fits in the order for
            this device (`ops/order.py`); the reference, with a warning, where none does.

    Returns:
        [B, Hq, Sq, D] in query's dtype and memory layout. A row that sees no key is `gate * O_prefix`, never NaN.

    Numbers:
        Scores S_w, their log-sum-exp LSE_w and all sums are float32 (float64 for float64 inputs). A score has an error of
        some 2^-24 |S_w|, and P_w = exp(S_w - LSE_w), dV, dQ and dK have, relative to their size, one like it: less than
        float16's own rounding up to |S_w| = 2^12, less than bfloat16's up to 2^15, and a tenth of the result at 10^6, as in
        FlashAttention and in eager float32. D_w = rowsum(dO * O) - gate * D_p has the rounding of the saved output; where
        one key has all of a row's probability, D_w is that key's dP and the gradient of the scores exactly 0. An output
        beyond the range of its dtype is infinite; gradients do not depend on it.

    Raises:
        ValueError, RuntimeError: an argument does not fit; the message names it, what was expected and what came. Values
            of integer tensors are checked on the CPU only: on a GPU that would cost a synchronisation.
    """
    checks.check_tensors(query=query, key=key, value=value)
    checks.check_optional_tensors(
        prefix_key=prefix_key, prefix_value=prefix_value, gate=gate, attn_mask=attn_mask, key_start=key_start,
        key_end=key_end, prefix_index=prefix_index,
    )  # fmt: skip
    checks.check_flag("is_causal", is_causal)
    query, key, value, prefix_key, prefix_value = _autocast(query, key, value, prefix_key, prefix_value)
    checks.check_attention(query, key, value, rank=4)
    batch = query.shape[0]
    checks.check_prefix(query, key, prefix_key, prefix_value, gate, prefix_index, batch)
    checks.check_mask(attn_mask, query, key)
    for name, lengths in (("key_start", key_start), ("key_end", key_end)):
        if lengths is not None:
            checks.check_integers(name, lengths, batch, query)
    scale = checks.scale_of(scale, query.shape[-1])
    inputs = Inputs(query, key, value, prefix_key, prefix_value, _gate_per_prefix_and_head(gate, prefix_key, query))
    chosen = choose(backend, query, _pass(*inputs))
    if chosen == "reference":
        return reference.forward(
            inputs, is_causal=is_causal, scale=scale, attn_mask=attn_mask, key_start=key_start, key_end=key_end,
            prefix_index=prefix_index,
        )[0]  # fmt: skip
    checks.check_no_tangent(*inputs)
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
    return _forward(
        chosen, *inputs, attn_mask,
        _int32("key_start", key_start, 0, key.shape[2]), _int32("key_end", key_end, 0, key.shape[2]),
        _index(prefix_index, prefix_key), None, None, 0, 0, scale, is_causal,
    )  # fmt: skip


def zero_gate_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor | None,
    prefix_value: Tensor | None,
    gate: Tensor | None,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    is_causal: bool = False,
    scale: float | None = None,
    prefix_index: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Zero-init attention over packed sequences that do not see each other: no padding is computed.

    Args:
        query: [T, Hq, D], the tokens of all sequences one after the other.
        key, value: [Tk, Hkv, D].
        prefix_key, prefix_value, gate, is_causal, scale, prefix_index, backend: as in `zero_gate_attention`, where B is
            the number of sequences.
        cu_seqlens_q, cu_seqlens_k: [B + 1] int32 or int64, the offsets of the sequences: sequence b is
            `query[cu_seqlens_q[b]:cu_seqlens_q[b + 1]]`. Sequences may be empty.
        max_seqlen_q, max_seqlen_k: at least the longest sequence.

    Returns:
        [T, Hq, D]. Tokens after the last sequence belong to none, their output is 0.

    Raises:
        ValueError, RuntimeError: as `zero_gate_attention`.
    """
    checks.check_tensors(query=query, key=key, value=value, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    checks.check_optional_tensors(
        prefix_key=prefix_key, prefix_value=prefix_value, gate=gate, prefix_index=prefix_index
    )  # fmt: skip
    checks.check_flag("is_causal", is_causal)
    query, key, value, prefix_key, prefix_value = _autocast(query, key, value, prefix_key, prefix_value)
    checks.check_attention(query, key, value, rank=3)
    if cu_seqlens_q.dim() != 1 or cu_seqlens_q.shape[0] == 0:
        raise ValueError(f"cu_seqlens_q: expected shape [batch + 1], got {list(cu_seqlens_q.shape)}")
    batch = cu_seqlens_q.shape[0] - 1
    checks.check_integers("cu_seqlens_q", cu_seqlens_q, batch + 1, query)
    checks.check_integers("cu_seqlens_k", cu_seqlens_k, batch + 1, query)
    max_seqlen_q = checks.count_of("max_seqlen_q", max_seqlen_q)
    max_seqlen_k = checks.count_of("max_seqlen_k", max_seqlen_k)
    checks.check_prefix(query, key, prefix_key, prefix_value, gate, prefix_index, batch)
    scale = checks.scale_of(scale, query.shape[-1])
    inputs = Inputs(query, key, value, prefix_key, prefix_value, _gate_per_prefix_and_head(gate, prefix_key, query))
    chosen = choose(backend, query, _pass(*inputs))
    if chosen == "reference":
        return reference.forward_varlen(
            inputs, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, max_seqlen_q=max_seqlen_q,
            max_seqlen_k=max_seqlen_k, is_causal=is_causal, scale=scale, prefix_index=prefix_index,
        )[0]  # fmt: skip
    checks.check_no_tangent(*inputs)
    return _forward(
        chosen, *inputs, None, None, None, _index(prefix_index, prefix_key),
        _offsets("cu_seqlens_q", cu_seqlens_q, query.shape[0], "max_seqlen_q", max_seqlen_q),
        _offsets("cu_seqlens_k", cu_seqlens_k, key.shape[0], "max_seqlen_k", max_seqlen_k),
        max_seqlen_q, max_seqlen_k, scale, is_causal,
    )  # fmt: skip


def zero_gate_decode(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cache_lengths: Tensor | None,
    prefix_key: Tensor | None,
    prefix_value: Tensor | None,
    gate: Tensor | None,
    *,
    scale: float | None = None,
    prefix_index: Tensor | None = None,
    key_start: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Few new queries against a key/value cache: causal zero-init attention with `key_end = cache_lengths`.

    The keys are split over the processor, so that one sequence uses all of it. No gradient.

    Args:
        query: [B, Hq, Sq, D], the newest Sq tokens of each sequence (usually 1).
        key_cache, value_cache: [B, Hkv, S, D], of which the first cache_lengths[b] keys are valid.
        cache_lengths: [B] int32 or int64, valid keys with the new ones included; None: the whole cache.
        prefix_key, prefix_value, gate, scale, prefix_index, key_start, backend: as in `zero_gate_attention`.

    Returns:
        [B, Hq, Sq, D].

    Raises:
        ValueError: a gradient is asked for, or as `zero_gate_attention`.
    """
    checks.check_tensors(query=query, key_cache=key_cache, value_cache=value_cache)
    checks.check_optional_tensors(
        cache_lengths=cache_lengths, prefix_key=prefix_key, prefix_value=prefix_value, gate=gate,
        prefix_index=prefix_index, key_start=key_start,
    )  # fmt: skip
    query, key_cache, value_cache, prefix_key, prefix_value = _autocast(
        query, key_cache, value_cache, prefix_key, prefix_value
    )
    tensors = {"query": query, "key_cache": key_cache, "value_cache": value_cache, "prefix_key": prefix_key,
               "prefix_value": prefix_value, "gate": gate}  # fmt: skip
    if torch.is_grad_enabled():
        for name, tensor in tensors.items():
            if tensor is not None and tensor.requires_grad:
                raise ValueError(
                    f"{name}: expected no gradient (decode has none), got requires_grad=True; "
                    "use torch.no_grad() or zero_gate_attention"
                )
    checks.check_attention(query, key_cache, value_cache, rank=4, key_name="key_cache", value_name="value_cache")
    batch = query.shape[0]
    checks.check_prefix(query, key_cache, prefix_key, prefix_value, gate, prefix_index, batch)
    for name, lengths in (("cache_lengths", cache_lengths), ("key_start", key_start)):
        if lengths is not None:
            checks.check_integers(name, lengths, batch, query)
    # Here and not in the op, which knows them as key_end.
    checks.check_range("cache_lengths", cache_lengths, 0, key_cache.shape[2])
    scale = checks.scale_of(scale, query.shape[-1])
    gate = _gate_per_prefix_and_head(gate, prefix_key, query)
    inputs = Inputs(query, key_cache, value_cache, prefix_key, prefix_value, gate)
    chosen = choose(backend, query, "decode")
    if chosen == "reference":
        return reference.forward(
            inputs, is_causal=True, scale=scale, key_start=key_start, key_end=cache_lengths, prefix_index=prefix_index,
        )[0]  # fmt: skip
    checks.check_no_tangent(*inputs)
    longest = key_cache.shape[2]
    arguments = (
        *inputs, _int32("key_start", key_start, 0, longest), _int32("cache_lengths", cache_lengths, 0, longest),
        _index(prefix_index, prefix_key), scale, True,
    )  # fmt: skip
    if transforms.active():
        return transforms.decode(_op(chosen), *arguments)
    output: Tensor = _op(chosen).decode(*arguments)
    return output


def _forward(backend: str, *arguments: Any) -> Tensor:
    """The output of the op `forward`, differentiable also by torch.func."""
    if transforms.active():
        return transforms.forward(_op(backend), *arguments)[0]
    output: Tensor = _op(backend).forward(*arguments)[0]
    return output


def _pass(*tensors: Tensor | None) -> Pass:
    """Whether a backward pass will follow, as far as one can see now."""
    training = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
    return "backward" if training else "forward"


def _op(backend: str) -> "torch._ops._OpNamespace":
    return torch.ops.llama_adapter_kernels_triton if backend == "triton" else torch.ops.llama_adapter_kernels


def _int32(name: str, tensor: Tensor | None, low: int, high: int) -> Tensor | None:
    """Lengths or indices as the ops take them, which check int32 values themselves where those are free to read."""
    if tensor is None:
        return None
    if tensor.dtype == torch.int64:
        checks.check_range(name, tensor, low, high)  # before a value beyond int32 becomes another
        limits = torch.iinfo(torch.int32)
        tensor = tensor.clamp(limits.min, limits.max)  # saturates: 2**32 + 3 stays out of range on a GPU, too
    return tensor.to(torch.int32).contiguous()


def _index(prefix_index: Tensor | None, prefix_key: Tensor | None) -> Tensor | None:
    return _int32("prefix_index", prefix_index, -1, 0 if prefix_key is None else prefix_key.shape[0] - 1)


def _offsets(name: str, cu_seqlens: Tensor, total: int, longest_name: str, longest: int) -> Tensor:
    if cu_seqlens.dtype == torch.int64:
        checks.check_cu_seqlens(cu_seqlens, name, total, longest, longest_name)
    limits = torch.iinfo(torch.int32)
    return cu_seqlens.clamp(limits.min, limits.max).to(torch.int32).contiguous()


def _gate_per_prefix_and_head(gate: Tensor | None, prefix_key: Tensor | None, query: Tensor) -> Tensor | None:
    """Every gate form as one [A, Hq] view in the accumulator's dtype; autograd sums the gradient back."""
    if gate is None or prefix_key is None:
        return None
    return gate.to(registration.accumulator_dtype(query.dtype)).expand(prefix_key.shape[0], query.shape[1])


# Asked once: torch 2.11 cannot trace the question.
_AUTOCAST_DEVICES = tuple(name for name in ("cpu", "cuda", "xpu", "mps") if torch.amp.is_autocast_available(name))


def _autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Under torch.autocast attention runs in the lower precision, as scaled_dot_product_attention does."""
    device_type = tensors[0].device.type if tensors[0] is not None else "cpu"
    if device_type not in _AUTOCAST_DEVICES or not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    cast = (torch.float32, torch.bfloat16, torch.float16)  # float64 stays, as in torch
    return tuple(tensor.to(dtype) if tensor is not None and tensor.dtype in cast else tensor for tensor in tensors)
