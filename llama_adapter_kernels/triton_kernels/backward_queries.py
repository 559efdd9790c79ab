# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Backward, owner of queries: dQ of a block of rows, swept over the keys and the prefix.

P = exp(scale Q K^T - LSE)   dS = P * (dO V^T - D_w)   dQ = scale (dS K + gate dS_p Kp)
"""

import triton
import triton.language as tl

from llama_adapter_kernels.triton_kernels.prefix import (
    PREFIX_LOOP,
    PREFIX_NONE,
    PREFIX_ONE_TILE,
    load_slots,
    prefix_scores,
    prefix_softmax,
)
from llama_adapter_kernels.triton_kernels.problem import (
    choose_prefix,
    load_gate,
    locate_rows,
    packed_tokens,
    sequence_windows,
    statistic_row,
    valid_keys,
)
from llama_adapter_kernels.triton_kernels.scores import (
    MASK_NONE,
    load_statistics,
    mark_delta,
    masked_probabilities,
    score_gradient,
    visible,
    visible_blocks,
    word_probabilities,
)
from llama_adapter_kernels.triton_kernels.tiles import (
    dot,
    dot_add,
    head_rows,
    load_described,
    load_rows,
    load_tile,
    loop_bound,
    offset,
    store_rows,
    tile_offsets,
)


@triton.jit
def sweep_keys(
    dquery, query, doutput, key_tile, value_tile, key_descriptor, value_descriptor, b, head_kv, mask_rows, key_stride,
    value_stride, mask_stride_key, row_logsumexp, row_delta, start, blocks, last, row_begin, row_end, row_valid,
    scale_log2,
    BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, CHECK: tl.constexpr, MASK: tl.constexpr,
    TOKENS: tl.constexpr, ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """Adds `blocks` blocks of keys from `start` to dQ / scale, see `attend`."""
    for block in tl.range(0, loop_bound(blocks)):
        key_first = start + block * BLOCK_N
        columns = key_first + tl.arange(0, BLOCK_N)
        there = columns < last
        if not CHECK and key_descriptor is not None:
            key = load_described(key_descriptor, b, head_kv, key_first, BLOCK_N, BLOCK_D)
        else:
            key = load_tile(key_tile + offset(key_first, key_stride, ALIGNMENT), there, HEAD_DIM, BLOCK_D, CHECK)
        if not CHECK and value_descriptor is not None:
            value = load_described(value_descriptor, b, head_kv, key_first, BLOCK_N, BLOCK_D)
        else:
            value = load_tile(value_tile + offset(key_first, value_stride, ALIGNMENT), there, HEAD_DIM, BLOCK_D, CHECK)
        probabilities = masked_probabilities(
            dot(query, tl.trans(key)), scale_log2, row_logsumexp[:, None], mask_rows[:, None],
            offset(columns, mask_stride_key, 1)[None, :], there[None, :], row_valid[:, None], MASK,
        )  # fmt: skip
        if CHECK:
            probabilities = tl.where(visible(columns, row_begin, row_end, TOKENS), probabilities, 0.0)
        dscores = score_gradient(probabilities, dot(doutput, tl.trans(value)), row_delta[:, None], CHECK)
        dquery = dot_add(dscores.to(key.dtype), key, dquery)
    return dquery


@triton.jit
def backward_queries(
    row_block, head, b,
    query, key, value, prefix_key, prefix_value, gate, doutput, statistics, windows, prefix_logsumexp,
    prefix_delta, dquery, mask, key_start, key_end, prefix_index, cu_seqlens_q, cu_seqlens_k, key_descriptor,
    value_descriptor,
    query_strides, key_strides, value_strides, prefix_key_strides, prefix_value_strides, doutput_strides,
    dquery_strides,
    gate_stride_prefix, gate_stride_head, mask_stride_batch, mask_stride_head, mask_stride_query, mask_stride_key,
    heads_q, group, seq_q, seq_k, total_q, total_k, sequences, prefix_count, prefix_length, scale, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr, PREFIX: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr, TOKENS: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """BLOCK_M queries of one head: all of dQ for them."""
    row_first = row_block * BLOCK_M
    query_first = b * 0
    queries = seq_q + 0
    key_first = b * 0
    keys = seq_k + 0
    row_low = b * 0
    if TOKENS:
        row_low, row_high = packed_tokens(cu_seqlens_q, sequences, total_q)
    else:
        query_first, queries = locate_rows(b, cu_seqlens_q, seq_q, total_q)
        key_first, keys = locate_rows(b, cu_seqlens_k, seq_k, total_k)
        row_high = queries
    begin, end = valid_keys(b, key_start, key_end, keys)
    if row_first < queries:
        rows = row_first + tl.arange(0, BLOCK_M)
        row_valid = (rows >= row_low) & (rows < row_high)
        head_kv = head // group
        q = load_rows(query, b, head, query_first, rows, row_valid, query_strides, HEAD_DIM, BLOCK_D, ALIGNMENT)
        do = load_rows(doutput, b, head, query_first, rows, row_valid, doutput_strides, HEAD_DIM, BLOCK_D, ALIGNMENT)
        statistic = statistic_row(b, head, query_first, heads_q, total_q, cu_seqlens_q is not None)
        row_logsumexp, row_delta = load_statistics(statistics + 2 * (statistic + rows), row_valid, True)
        if TOKENS:
            row_begin = tl.load(windows + 2 * rows, mask=row_valid, other=0)
            row_end = tl.load(windows + 2 * rows + 1, mask=row_valid, other=0)
        else:
            row_begin, row_end = sequence_windows(rows, queries, begin, end, CAUSAL)

        column = tl.arange(0, BLOCK_N)
        key_tile = head_rows(key, b, head_kv, key_first, key_strides, ALIGNMENT)
        key_tile += tile_offsets(column, key_strides[2], BLOCK_D, ALIGNMENT)
        value_tile = head_rows(value, b, head_kv, key_first, value_strides, ALIGNMENT)
        value_tile += tile_offsets(column, value_strides[2], BLOCK_D, ALIGNMENT)
        mask_rows = rows
        if MASK != MASK_NONE:
            mask_base = mask + offset(b, mask_stride_batch, 1) + offset(head, mask_stride_head, 1)
            mask_rows = mask_base + offset(rows, mask_stride_query, 1)
        row_last = row_first + BLOCK_M - 1  # or past the last query, where none sees more keys
        first, last, blocks, whole = visible_blocks(
            row_begin, row_end, row_valid, row_first, row_last, queries, begin, end, keys, BLOCK_N, CAUSAL, TOKENS
        )
        dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        if MASK == MASK_NONE:
            dq = sweep_keys(
                dq, q, do, key_tile, value_tile, key_descriptor, value_descriptor, b, head_kv, mask_rows,
                key_strides[2], value_strides[2], mask_stride_key, row_logsumexp, row_delta, first, whole, last,
                row_begin, row_end, row_valid, scale_log2,
                BLOCK_N, HEAD_DIM, BLOCK_D, False, MASK, TOKENS, ALIGNMENT,
            )  # fmt: skip
        else:
            whole = blocks * 0
        dq = sweep_keys(
            dq, q, do, key_tile, value_tile, None, None, b, head_kv, mask_rows,
            key_strides[2], value_strides[2], mask_stride_key, row_logsumexp, row_delta, first + whole * BLOCK_N,
            blocks - whole, last, row_begin, row_end, row_valid, scale_log2,
            BLOCK_N, HEAD_DIM, BLOCK_D, True, MASK, TOKENS, ALIGNMENT,
        )  # fmt: skip

        if PREFIX != PREFIX_NONE:
            entry, slots, bad = choose_prefix(b, prefix_index, prefix_count, prefix_length)
            gate_value = load_gate(gate, entry, head, slots, bad, gate_stride_prefix, gate_stride_head)
            slot = tl.arange(0, BLOCK_P)
        if PREFIX == PREFIX_ONE_TILE:
            prefix_k = load_slots(prefix_key, entry, head_kv, slots * 0, slots, prefix_key_strides,
                                  BLOCK_P, HEAD_DIM, BLOCK_D, ALIGNMENT)  # fmt: skip
            prefix_v = load_slots(prefix_value, entry, head_kv, slots * 0, slots, prefix_value_strides,
                                  BLOCK_P, HEAD_DIM, BLOCK_D, ALIGNMENT)  # fmt: skip
            probabilities = prefix_softmax(prefix_scores(q, prefix_k, slot, slots, scale_log2), 1)
            dprobabilities = dot(do, tl.trans(prefix_v))
            marked = mark_delta(tl.sum(probabilities * dprobabilities, 1), slots == 1)
            dscores = gate_value * score_gradient(probabilities, dprobabilities, marked[:, None], True)
            dq = dot_add(dscores.to(prefix_k.dtype), prefix_k, dq)
        if PREFIX == PREFIX_LOOP:
            row_logsumexp = tl.load(prefix_logsumexp + statistic + rows, mask=row_valid, other=0.0)
            row_delta = tl.load(prefix_delta + statistic + rows, mask=row_valid, other=0.0)
            for tile in tl.range(0, loop_bound(tl.cdiv(slots, BLOCK_P))):
                slot_first = slots * 0 + tile * BLOCK_P
                prefix_k = load_slots(prefix_key, entry, head_kv, slot_first, slots, prefix_key_strides,
                                      BLOCK_P, HEAD_DIM, BLOCK_D, ALIGNMENT)  # fmt: skip
                prefix_v = load_slots(prefix_value, entry, head_kv, slot_first, slots, prefix_value_strides,
                                      BLOCK_P, HEAD_DIM, BLOCK_D, ALIGNMENT)  # fmt: skip
                probabilities = word_probabilities(
                    dot(q, tl.trans(prefix_k)), scale_log2, row_logsumexp[:, None], False
                )
                probabilities = tl.where((slot_first + slot < slots)[None, :], probabilities, 0.0)
                dscores = score_gradient(probabilities, dot(do, tl.trans(prefix_v)), row_delta[:, None], True)
                dq = dot_add((gate_value * dscores).to(prefix_k.dtype), prefix_k, dq)

        row_exists = row_valid
        if TOKENS:  # tokens of no sequence: zeros
            row_exists = rows < total_q
            dq = tl.where(row_valid[:, None], dq, 0.0)
        store_rows(
            dquery, b, head, query_first, rows, dq * scale, row_exists, dquery_strides, HEAD_DIM, BLOCK_D, ALIGNMENT
        )  # fmt: skip
