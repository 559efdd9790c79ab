"""The definition of zero-init attention, in eager PyTorch, on any device and dtype.

Source: arXiv 2303.16199, equations 5 to 8. Every other backend is tested against this file in float64. It is written to
be read, computes in the dtype it is given, and keeps whole score matrices: use it for tests, not for training.

Names: B sequences, Hq query heads, Hkv key/value heads, Sq queries, Sk keys, D head_dim, P prefix slots, A prefixes.
"""

import torch
from torch import Tensor

from llama_adapter_kernels.ops import checks
from llama_adapter_kernels.ops.arguments import Inputs


def forward(
    inputs: Inputs,
    *,
    is_causal: bool = False,
    scale: float,
    attn_mask: Tensor | None = None,
    key_start: Tensor | None = None,
    key_end: Tensor | None = None,
    prefix_index: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns (output [B, Hq, Sq, D], log-sum-exp of the word scores [B, Hq, Sq])."""
    query, key, value, prefix_key, prefix_value, gate = inputs
    checks.check_values(key, prefix_key, key_start, key_end, prefix_index)
    group = query.shape[1] // max(key.shape[1], 1)
    key, value = (tensor.repeat_interleave(group, dim=1) for tensor in (key, value))

    if key_start is not None or key_end is not None:
        # Keys outside of the window may be memory nobody wrote (a cache): 0 times that must not be NaN.
        outside = ~window(query.shape[0], key, key_start, key_end)[:, None, :, None]
        key, value = key.masked_fill(outside, 0), value.masked_fill(outside, 0)

    # Words: softmax over the keys a query may see; a row that sees none gives 0, not NaN.
    scores = scale * (query @ key.transpose(-1, -2))
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        scores = scores + attn_mask.to(scores.dtype)
        attn_mask = attn_mask != -torch.inf  # NaN hides nothing
    allowed = allowed_keys(query, key, is_causal, attn_mask, key_start, key_end)
    scores = scores.masked_fill(~allowed, -torch.inf)
    row_sees_nothing = (scores == -torch.inf).all(dim=-1, keepdim=True)  # a finite mask may overflow to -inf as well
    probabilities = torch.softmax(scores.masked_fill(row_sees_nothing, 0), dim=-1).masked_fill(row_sees_nothing, 0)
    output = probabilities @ value
    logsumexp = torch.logsumexp(scores, dim=-1)
    if prefix_key is None or prefix_value is None or gate is None:
        return output, logsumexp

    # Prefix: a softmax of its own over P slots that every query sees, multiplied by the gate.
    prefix_key, prefix_value, gate = select_prefix(prefix_key, prefix_value, gate, prefix_index)
    prefix_key, prefix_value = (tensor.repeat_interleave(group, dim=1) for tensor in (prefix_key, prefix_value))
    prefix_scores = scale * (query @ prefix_key.transpose(-1, -2))
    prefix_output = torch.softmax(prefix_scores, dim=-1) @ prefix_value
    return output + gate.to(output.dtype)[:, :, None, None] * prefix_output, logsumexp


def allowed_keys(
    query: Tensor,
    key: Tensor,
    is_causal: bool,
    attn_mask: Tensor | None,
    key_start: Tensor | None,
    key_end: Tensor | None,
) -> Tensor:
    """Bool, broadcastable to [B, Hq, Sq, Sk]: a key counts only where causality, window and mask all allow it."""
    seq_q, seq_k = query.shape[2], key.shape[2]
    row = torch.arange(seq_q, device=query.device)[:, None]
    column = torch.arange(seq_k, device=query.device)[None, :]
    allowed = window(query.shape[0], key, key_start, key_end)[:, None, None, :] & torch.ones_like(row, dtype=torch.bool)
    if is_causal:  # bottom-right: the last query sees the last valid key
        end = seq_k if key_end is None else key_end[:, None, None, None]
        allowed = allowed & (column <= row + (end - seq_q))
    if attn_mask is not None:
        allowed = allowed & attn_mask
    return allowed


def window(batch: int, key: Tensor, key_start: Tensor | None, key_end: Tensor | None) -> Tensor:
    """Bool [B, Sk]: the keys [key_start, key_end) of each sequence."""
    column = torch.arange(key.shape[2], device=key.device).expand(batch, -1)
    inside = torch.ones_like(column, dtype=torch.bool)
    if key_start is not None:
        inside = inside & (column >= key_start[:, None])
    if key_end is not None:
        inside = inside & (column < key_end[:, None])
    return inside


def select_prefix(
    prefix_key: Tensor, prefix_value: Tensor, gate: Tensor, prefix_index: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gives each sequence its prefix [B, Hkv, P, D] and gate [B, Hq]; index -1 (no prefix): zeros."""
    if prefix_index is None:
        return prefix_key, prefix_value, gate.expand(prefix_key.shape[0], -1)
    entry, none = prefix_index.clamp(min=0).long(), prefix_index < 0
    prefix_key, prefix_value = (t[entry].masked_fill(none[:, None, None, None], 0) for t in (prefix_key, prefix_value))
    return prefix_key, prefix_value, gate[entry].masked_fill(none[:, None], 0)


def forward_varlen(
    inputs: Inputs,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    is_causal: bool = False,
    scale: float,
    prefix_index: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Packed sequences [T, H, D]: each one on its own. Returns (output [T, Hq, D], log-sum-exp [Hq, T]).

    Tokens after the last sequence belong to none; their output is 0.
    """
    query, key, value, prefix_key, prefix_value, gate = inputs
    checks.check_cu_seqlens(cu_seqlens_q, "cu_seqlens_q", query.shape[0], max_seqlen_q, "max_seqlen_q")
    checks.check_cu_seqlens(cu_seqlens_k, "cu_seqlens_k", key.shape[0], max_seqlen_k, "max_seqlen_k")
    checks.check_values(key, prefix_key, None, None, prefix_index)
    outputs, statistics = [], []
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for b in range(len(starts_q) - 1):
        tokens_q, tokens_k = slice(starts_q[b], starts_q[b + 1]), slice(starts_k[b], starts_k[b + 1])
        one_per_sequence = prefix_index is None and prefix_key is not None and prefix_key.shape[0] > 1
        entry = slice(b, b + 1) if one_per_sequence else slice(None)
        sequence = Inputs(
            query[tokens_q].transpose(0, 1)[None],
            key[tokens_k].transpose(0, 1)[None],
            value[tokens_k].transpose(0, 1)[None],
            None if prefix_key is None else prefix_key[entry],
            None if prefix_value is None else prefix_value[entry],
            None if gate is None else gate.expand(prefix_key.shape[0], -1)[entry] if prefix_key is not None else gate,
        )
        output, logsumexp = forward(
            sequence,
            is_causal=is_causal,
            scale=scale,
            prefix_index=None if prefix_index is None else prefix_index[b : b + 1],
        )
        outputs.append(output[0].transpose(0, 1))
        statistics.append(logsumexp[0])
    rest = query.shape[0] - starts_q[-1]
    outputs.append(query.new_zeros(rest, *query.shape[1:]))
    statistics.append(query.new_full((query.shape[1], rest), -torch.inf))
    return torch.cat(outputs), torch.cat(statistics, dim=1)
