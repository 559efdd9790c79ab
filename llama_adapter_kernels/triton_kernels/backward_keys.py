# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Backward of the words, owner of keys: dK and dV of a block of keys, swept over the queries of every head of the group.

    P = exp(scale Q K^T - LSE)   dS = P * (dO V^T - D_w)   dV = P^T dO   dK = scale dS^T Q

Scores are held transposed [keys, queries]: probabilities then feed the matrix unit from registers.
"""

import triton
import triton.language as tl

from llama_adapter_kernels.triton_kernels.problem import (
    locate_rows,
    packed_tokens,
    seeing_rows,
    statistic_row,
    valid_keys,
)
from llama_adapter_kernels.triton_kernels.scores import (
    MASK_NONE,
    load_statistics,
    masked_probabilities,
    score_gradient,
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
def sweep_queries(
    dkey, dvalue, key, value, query_tile, doutput_tile, query_descriptor, doutput_descriptor, statistics, windows,
    mask_base, b, head_first, query_strides, doutput_strides, mask_stride_head, mask_stride_query,
    mask_stride_key, heads, total_q, columns, column_valid, start_first, blocks, diagonal, row_low, scale_log2,
    BLOCK_M: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, CHECK: tl.constexpr, CAUSAL: tl.constexpr,
    MASK: tl.constexpr, TOKENS: tl.constexpr, ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """Adds to dK / scale and dV, for each of `heads` query heads, `blocks` blocks of queries from row `start_first`.

    Rows before row_low are not there; blocks end with the last row. Pointers are those of the first head. Without CHECK
    every row sees every key of the block. Columns of keys that are not valid hold anything: they only reach rows of dK and
    dV that the caller zeroes. One loop over (head, block): with a loop in a loop, ptxas keeps the key and value tiles twice
    and spills.
    """
    start_end = start_first + blocks * BLOCK_M
    start = start_first
    head = start_first * 0
    for _ in tl.range(0, loop_bound(heads * blocks)):
        rows = start + tl.arange(0, BLOCK_M)
        row_valid = rows >= row_low
        if not CHECK and query_descriptor is not None:
            query = load_described(query_descriptor, b, head_first + head, start, BLOCK_M, BLOCK_D)
        else:
            query_now = (
                query_tile + offset(head, query_strides[1], ALIGNMENT) + offset(start, query_strides[2], ALIGNMENT)
            )
            query = load_tile(query_now, row_valid, HEAD_DIM, BLOCK_D, CHECK)
        scores = dot(key, tl.trans(query))
        row_logsumexp, row_delta = load_statistics(
            statistics + 2 * (head.to(tl.int64) * total_q + rows), row_valid, CHECK
        )
        mask_columns = rows[None, :]
        if MASK != MASK_NONE:
            mask_columns = offset(head, mask_stride_head, 1) + offset(rows, mask_stride_query, 1)[None, :]
        probabilities = masked_probabilities(
            scores, scale_log2, row_logsumexp[None, :], mask_base + offset(columns, mask_stride_key, 1)[:, None],
            mask_columns, column_valid[:, None], row_valid[None, :], MASK,
        )  # fmt: skip
        if CHECK:
            if TOKENS:
                row_begin = tl.load(windows + 2 * rows, mask=row_valid, other=0)
                row_end = tl.load(windows + 2 * rows + 1, mask=row_valid, other=0)
                seen = (columns[:, None] >= row_begin[None, :]) & (columns[:, None] < row_end[None, :])
            else:
                seen = column_valid[:, None] & row_valid[None, :]
                if CAUSAL:
                    seen = seen & (columns[:, None] <= rows[None, :] + diagonal)
            probabilities = tl.where(seen, probabilities, 0.0)
        if not CHECK and doutput_descriptor is not None:
            doutput = load_described(doutput_descriptor, b, head_first + head, start, BLOCK_M, BLOCK_D)
        else:
            doutput_now = doutput_tile + offset(head, doutput_strides[1], ALIGNMENT)
            doutput_now += offset(start, doutput_strides[2], ALIGNMENT)
            doutput = load_tile(doutput_now, row_valid, HEAD_DIM, BLOCK_D, CHECK)
        dvalue = dot_add(probabilities.to(doutput.dtype), doutput, dvalue)
        dscores = score_gradient(probabilities, dot(value, tl.trans(doutput)), row_delta[None, :], CHECK)
        dkey = dot_add(dscores.to(query.dtype), query, dkey)
        start += BLOCK_M
        last_of_head = start >= start_end
        start = tl.where(last_of_head, start_first, start)
        head += last_of_head.to(tl.int32)
    return dkey, dvalue


@triton.jit
def backward_keys(
    column_block, head_kv, b,
    query, key, value, doutput, statistics, windows, dkey, dvalue, mask, key_start, key_end, cu_seqlens_q,
    cu_seqlens_k, query_descriptor, doutput_descriptor,
    query_strides, key_strides, value_strides, doutput_strides, dkey_strides, dvalue_strides,
    mask_stride_batch, mask_stride_head, mask_stride_query, mask_stride_key,
    heads_q, group, seq_q, seq_k, total_q, total_k, sequences, search_steps, scale, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr,
    MASK: tl.constexpr, TOKENS: tl.constexpr, ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """BLOCK_N keys of one key/value head: all of dK and dV for them, zero where a key is not valid."""
    column_first = column_block * BLOCK_N
    query_first = b * 0
    queries = seq_q + 0
    key_first = b * 0
    keys = seq_k + 0
    if not TOKENS:
        query_first, queries = locate_rows(b, cu_seqlens_q, seq_q, total_q)
        key_first, keys = locate_rows(b, cu_seqlens_k, seq_k, total_k)
    begin, end = valid_keys(b, key_start, key_end, keys)
    if TOKENS:
        begin, end = packed_tokens(cu_seqlens_k, sequences, total_k)
    if column_first < keys:
        columns = column_first + tl.arange(0, BLOCK_N)
        column_valid = (columns >= begin) & (columns < end)
        k = load_rows(key, b, head_kv, key_first, columns, column_valid, key_strides, HEAD_DIM, BLOCK_D, ALIGNMENT)
        v = load_rows(value, b, head_kv, key_first, columns, column_valid, value_strides, HEAD_DIM, BLOCK_D, ALIGNMENT)

        # Rows that see a key of this block: from row_first; all of it: from row_whole. Blocks of rows end with the last
        # one, so that a partial block stands at the beginning, where the diagonal is tested anyway.
        column_low = tl.maximum(column_first, begin)
        column_high = tl.minimum(column_first + BLOCK_N, end) - 1
        diagonal = end - queries
        row_first = begin * 0
        row_whole = begin * 0
        row_stop = queries
        if TOKENS:
            row_first, row_whole, row_stop = seeing_rows(
                column_low, column_high, cu_seqlens_q, cu_seqlens_k, total_q, total_k, sequences, search_steps, CAUSAL
            )
        elif CAUSAL:
            row_first = tl.maximum(column_first - diagonal, 0)
            row_whole = tl.maximum(column_high - diagonal, 0)
        blocks = tl.cdiv(tl.maximum(row_stop - row_first, 0), BLOCK_M)
        blocks = tl.where(column_low <= column_high, blocks, 0)
        start_first = row_stop - blocks * BLOCK_M
        checked = tl.minimum(tl.cdiv(tl.maximum(row_whole - start_first, 0), BLOCK_M), blocks)
        # Rows of few keys are marked, and only checked blocks look for marks: see FEW_KEYS.
        checked = tl.where((column_first < begin) | (column_first + BLOCK_N > end), blocks, checked)
        if MASK != MASK_NONE:
            checked = blocks

        dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        row = tl.arange(0, BLOCK_M)
        head = head_kv * group
        query_tile = head_rows(query, b, head, query_first, query_strides, ALIGNMENT)
        query_tile += tile_offsets(row, query_strides[2], BLOCK_D, ALIGNMENT)
        doutput_tile = head_rows(doutput, b, head, query_first, doutput_strides, ALIGNMENT)
        doutput_tile += tile_offsets(row, doutput_strides[2], BLOCK_D, ALIGNMENT)
        statistics += 2 * statistic_row(b, head, query_first, heads_q, total_q, cu_seqlens_q is not None)
        mask_base = head * 0
        if MASK != MASK_NONE:
            mask_base = mask + offset(b, mask_stride_batch, 1) + offset(head, mask_stride_head, 1)
        dk, dv = sweep_queries(
            dk, dv, k, v, query_tile, doutput_tile, None, None, statistics, windows, mask_base, b, head,
            query_strides, doutput_strides, mask_stride_head, mask_stride_query, mask_stride_key, group, total_q,
            columns, column_valid, start_first, checked, diagonal, row_first, scale_log2,
            BLOCK_M, HEAD_DIM, BLOCK_D, True, CAUSAL, MASK, TOKENS, ALIGNMENT,
        )  # fmt: skip
        if MASK == MASK_NONE:
            dk, dv = sweep_queries(
                dk, dv, k, v, query_tile, doutput_tile, query_descriptor, doutput_descriptor, statistics, windows,
                mask_base, b, head, query_strides, doutput_strides, mask_stride_head, mask_stride_query,
                mask_stride_key, group, total_q, columns, column_valid, start_first + checked * BLOCK_M, blocks - checked,
                diagonal, row_first, scale_log2,
                BLOCK_M, HEAD_DIM, BLOCK_D, False, CAUSAL, MASK, TOKENS, ALIGNMENT,
            )  # fmt: skip

        dk = tl.where(column_valid[:, None], dk * scale, 0.0)
        dv = tl.where(column_valid[:, None], dv, 0.0)
        exists = columns < keys
        store_rows(dkey, b, head_kv, key_first, columns, dk, exists, dkey_strides, HEAD_DIM, BLOCK_D, ALIGNMENT)
        store_rows(dvalue, b, head_kv, key_first, columns, dv, exists, dvalue_strides, HEAD_DIM, BLOCK_D, ALIGNMENT)
