"""The attention function that transformers calls in place of its own.

The hook hands over query [B, Hq, S, D] (rotated and normed), key and value un-repeated with the whole cache, and what
`masks.zero_gate_mask` returned for this forward pass.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from llama_adapter_kernels.adapters.table import LayerPrefix
from llama_adapter_kernels.integrations.slot import PREFIX, ROUTING, SLOT, GivesPrefix
from llama_adapter_kernels.integrations.transformers.dropout import words_with_dropout
from llama_adapter_kernels.integrations.transformers.masks import CompactMask, Packed, Window
from llama_adapter_kernels.ops import backends
from llama_adapter_kernels.ops.attention import zero_gate_attention, zero_gate_attention_varlen, zero_gate_decode

IMPLEMENTATION = "zero_gate"  # must not contain "flash": transformers treats such names differently
_REFUSED = {
    "softcap": "a soft cap on scores",
    "s_aux": "attention sinks",
    "position_bias": "a position bias",
    "cache": "a paged cache (continuous batching)",
    "output_attentions": "the probabilities never exist as a tensor",
}


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | CompactMask | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer, with the prefix of its adapter if it has one. Returns (output [B, S, Hq, D], None).

    Raises:
        ValueError: the model asks for something that is not supported.
    """
    for name in kwargs:
        if name in _REFUSED and kwargs[name] is not None and kwargs[name] is not False:
            raise ValueError(f"{name}: not supported with a zero-gate adapter ({_REFUSED[name]})")
    slot: GivesPrefix | None = kwargs.get(PREFIX) or module._modules.get(SLOT)
    packed = kwargs.get("cu_seq_lens_q") is not None or isinstance(attention_mask, Packed)
    if packed and not dropout:
        return _packed(module, slot, query, key, value, attention_mask, scaling, kwargs), None
    if packed:
        raise ValueError(f"attention dropout: expected 0 for packed sequences, got {dropout}")
    prefix = None if slot is None else slot.prefix(module, query, kwargs.get(ROUTING), query.shape[0])
    start = end = mask = None
    if attention_mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    elif isinstance(attention_mask, Window):
        start, end, causal = attention_mask.start, attention_mask.end, attention_mask.causal
    else:
        mask, causal = attention_mask, False
    tables: tuple[LayerPrefix, ...] = () if prefix is None else prefix.others
    if dropout:
        output = words_with_dropout(query, key, value, attention_mask, dropout, scaling, causal)
        tables = tables if prefix is None else (prefix, *tables)
    elif query.shape[2] == 1 and mask is None and not _needs_gradient(query, key, value, prefix):
        output = _decode(query, key, value, prefix, start, end, scaling)
    else:
        output = zero_gate_attention(
            query, key, value, *_operands(prefix), is_causal=causal, scale=scaling, attn_mask=mask, key_start=start,
            key_end=end, prefix_index=None if prefix is None else prefix.prefix_index,
        )  # fmt: skip
    for table in tables:  # with no words the operation gives the prefix branch alone
        output = output + zero_gate_attention(
            query, key[:, :, :0], value[:, :, :0], *_operands(table), scale=scaling, prefix_index=table.prefix_index
        )
    return output.transpose(1, 2), None


def _operands(prefix: LayerPrefix | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    return (None, None, None) if prefix is None else (prefix.key, prefix.value, prefix.gate)


def _decode(
    query: Tensor, key: Tensor, value: Tensor, prefix: LayerPrefix | None, start: Tensor | None, end: Tensor | None,
    scaling: float | None,
) -> Tensor:  # fmt: skip
    """One new token per sequence, which sees every key of its window.

    A small model spends more time in Python than in attention here. What zero_gate_decode does for its callers holds
    already (the form of the gate, the types of the lengths) or is checked again by the op, so the op is called directly.
    """
    index = None if prefix is None else prefix.prefix_index
    if scaling is not None and not (
        torch.is_grad_enabled() or torch.compiler.is_compiling() or torch._C._is_any_autocast_enabled()
    ):
        op = _decode_op(backends.forced(), query.device, query.dtype, query.shape[3])
        if op is not None:
            with torch._C._AutoDispatchBelowAutograd():  # gradients are off: spares the op's autograd part, in Python
                output: Tensor = op(query, key, value, *_operands(prefix), start, end, index, scaling, True)
            return output
    return zero_gate_decode(
        query, key, value, end, *_operands(prefix), scale=scaling, key_start=start, prefix_index=index
    )


@lru_cache(maxsize=64)
def _decode_op(forced: tuple[str, ...], device: torch.device, dtype: torch.dtype, head_dim: int) -> Any:
    """The decode op of the backend that runs such tensors; None for the reference, which is no op."""
    chosen = backends.choose(None, torch.empty(0, head_dim, device=device, dtype=dtype), "decode")
    if chosen == "reference":
        return None
    namespace = torch.ops.llama_adapter_kernels_triton if chosen == "triton" else torch.ops.llama_adapter_kernels
    return namespace.decode.default


def _needs_gradient(query: Tensor, key: Tensor, value: Tensor, prefix: LayerPrefix | None) -> bool:
    if not torch.is_grad_enabled():
        return False
    tensors = (query, key, value, *_operands(prefix))
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _packed(
    module: Any, slot: GivesPrefix | None, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | CompactMask | None,
    scaling: float | None, kwargs: dict[str, Any],
) -> Tensor:  # fmt: skip
    """Packed sequences that do not see each other: by cu_seq_lens (FlashAttentionKwargs), or found in position_ids."""
    if kwargs.get("cu_seq_lens_q") is not None:
        offsets_q, offsets_k = kwargs["cu_seq_lens_q"], kwargs["cu_seq_lens_k"]
        longest_q, longest_k = int(kwargs["max_length_q"]), int(kwargs["max_length_k"])
        window = kwargs.get("sliding_window")
        if window is not None and longest_k > window:
            raise ValueError(
                f"max_length_k: expected at most sliding_window {window}, got {longest_k}; "
                "position_ids that restart with every sequence, without cu_seq_lens, are supported"
            )
        # While torch.compile traces, transformers always makes a mask from position_ids: not the caller's, and not used.
        if mask is not None and not isinstance(mask, Packed) and not torch.compiler.is_compiling():
            raise ValueError("cu_seq_lens_q: expected no attention_mask that hides anything besides, got both")
    else:
        assert isinstance(mask, Packed)
        offsets_q = offsets_k = mask.offsets
        longest_q = longest_k = mask.longest
    prefix = None if slot is None else slot.prefix(module, query, kwargs.get(ROUTING), offsets_q.shape[0] - 1)
    # [B, H, S, D] views of [B, S, H, D] memory: the rows of the batch lie one after the other already.
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    causal = getattr(module, "is_causal", True)
    output = zero_gate_attention_varlen(
        query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1), *_operands(prefix), cu_seqlens_q=offsets_q,
        cu_seqlens_k=offsets_k, max_seqlen_q=longest_q, max_seqlen_k=longest_k, is_causal=causal, scale=scaling,
        prefix_index=None if prefix is None else prefix.prefix_index,
    )  # fmt: skip
    for table in () if prefix is None else prefix.others:
        output = output + zero_gate_attention_varlen(
            query.flatten(0, 1), key.flatten(0, 1)[:0], value.flatten(0, 1)[:0], *_operands(table),
            cu_seqlens_q=offsets_q, cu_seqlens_k=torch.zeros_like(offsets_q), max_seqlen_q=longest_q, max_seqlen_k=0,
            scale=scaling, prefix_index=table.prefix_index,
        )  # fmt: skip
    return output.view(query.shape)
