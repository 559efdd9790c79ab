# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Backward, the part that is quadratic in the sequence: one launch in which some programs own keys and some queries.

P is computed again from Q, K and the saved log-sum-exp, once for dK and dV and once for dQ. No sum is shared between
programs, so there are no atomics and gradients are deterministic. Owners of the same tokens run side by side: what one
reads of Q, K, V and dO the other finds in the L2 cache.
"""

import triton
import triton.language as tl

from llama_adapter_kernels.triton_kernels.backward_keys import backward_keys
from llama_adapter_kernels.triton_kernels.backward_queries import backward_queries

VARYING = (
    "gate_stride_prefix", "gate_stride_head", "mask_stride_batch", "mask_stride_head", "mask_stride_query",
    "mask_stride_key", "heads_q", "heads_kv", "group", "seq_q", "seq_k", "total_q", "total_k", "sequences",
    "search_steps", "prefix_count", "prefix_length",
)  # fmt: skip


@triton.jit
def share_of(unit, column_blocks, row_blocks, group, REVERSED: tl.constexpr):
    """(whether this unit of a key/value head owns keys, its block, the query head of the group).

    With as many blocks of keys as of queries, the owners of a block follow one another; REVERSED: of the queries' blocks
    the last comes first, so that with causality long programs start early on both sides. Otherwise owners of keys come
    first.
    """
    alternate = column_blocks == row_blocks
    owns_keys = tl.where(alternate, unit % (1 + group) == 0, unit < column_blocks)
    block = unit // (1 + group)
    row_unit = tl.maximum(unit - column_blocks, 0)
    row_block = tl.where(alternate, block, row_unit % tl.maximum(row_blocks, 1))
    if REVERSED:
        row_block = row_blocks - 1 - row_block
    member = tl.where(alternate, unit % (1 + group) - 1, row_unit // tl.maximum(row_blocks, 1))
    return owns_keys, tl.where(owns_keys, tl.where(alternate, block, unit), row_block), tl.maximum(member, 0)


@triton.jit(do_not_specialize=VARYING)
def backward_words_kernel(
    query, key, value, prefix_key, prefix_value, gate, doutput, statistics, windows, prefix_logsumexp,
    prefix_delta, dquery, dkey, dvalue, mask, key_start, key_end, prefix_index, cu_seqlens_q, cu_seqlens_k,
    query_descriptor, doutput_descriptor, key_descriptor, value_descriptor,
    query_strides, key_strides, value_strides, prefix_key_strides, prefix_value_strides, doutput_strides,
    dquery_strides, dkey_strides, dvalue_strides,
    gate_stride_prefix, gate_stride_head, mask_stride_batch, mask_stride_head, mask_stride_query, mask_stride_key,
    heads_q, heads_kv, group, seq_q, seq_k, total_q, total_k, sequences, search_steps, prefix_count, prefix_length,
    scale, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, KEYS_M: tl.constexpr, KEYS_N: tl.constexpr,
    QUERIES_M: tl.constexpr, QUERIES_N: tl.constexpr, BLOCK_P: tl.constexpr, PREFIX: tl.constexpr,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, TOKENS: tl.constexpr, ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """Tiles: owners of keys hold KEYS_N keys and sweep KEYS_M queries, owners of queries QUERIES_M and QUERIES_N.
    dquery, or dkey and dvalue, may be None: nobody asked for them."""
    program = tl.program_id(0)
    column_blocks = program * 0
    row_blocks = program * 0
    if dkey is not None:
        column_blocks = tl.cdiv(seq_k, KEYS_N)
    if dquery is not None:
        row_blocks = tl.cdiv(seq_q, QUERIES_M)
    units = column_blocks + row_blocks * group
    owns_keys, block, member = share_of(program % units, column_blocks, row_blocks, group, CAUSAL and not TOKENS)
    head_kv = program // units % heads_kv
    b = program // (units * heads_kv)
    if owns_keys:
        if dkey is not None:
            backward_keys(
                block, head_kv, b,
                query, key, value, doutput, statistics, windows, dkey, dvalue, mask, key_start, key_end,
                cu_seqlens_q, cu_seqlens_k, query_descriptor, doutput_descriptor,
                query_strides, key_strides, value_strides, doutput_strides, dkey_strides, dvalue_strides,
                mask_stride_batch, mask_stride_head, mask_stride_query, mask_stride_key,
                heads_q, group, seq_q, seq_k, total_q, total_k, sequences, search_steps, scale, scale_log2,
                HEAD_DIM, BLOCK_D, KEYS_M, KEYS_N, CAUSAL, MASK, TOKENS, ALIGNMENT,
            )  # fmt: skip
    else:
        if dquery is not None:
            backward_queries(
                block, head_kv * group + member, b,
                query, key, value, prefix_key, prefix_value, gate, doutput, statistics, windows, prefix_logsumexp,
                prefix_delta, dquery, mask, key_start, key_end, prefix_index, cu_seqlens_q, cu_seqlens_k,
                key_descriptor, value_descriptor,
                query_strides, key_strides, value_strides, prefix_key_strides, prefix_value_strides, doutput_strides,
                dquery_strides,
                gate_stride_prefix, gate_stride_head, mask_stride_batch, mask_stride_head, mask_stride_query,
                mask_stride_key,
                heads_q, group, seq_q, seq_k, total_q, total_k, sequences, prefix_count, prefix_length, scale,
                scale_log2,
                HEAD_DIM, BLOCK_D, QUERIES_M, QUERIES_N, BLOCK_P, PREFIX, CAUSAL, MASK, TOKENS, ALIGNMENT,
            )  # fmt: skip
