# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Backward, the part that is quadratic in the sequence. P is computed again from Q, K and the saved log-sum-exp.

    P = exp(scale Q K^T - LSE)   dS = P * (dO V^T - D_w)   dV = P^T dO   dK = scale dS^T Q   dQ = scale dS K

Two kernels: one owns a block of keys and sweeps the queries (of every head of the group), one owns a block of queries
and sweeps the keys and the prefix. No sum is shared between programs, so there are no atomics and gradients are
deterministic. The key kernel holds its scores transposed [keys, queries]: probabilities then feed the matrix unit from
registers.
"""

import triton
import triton.language as tl

from llama_adapter_kernels.triton_kernels.forward_kernels import visible_blocks
from llama_adapter_kernels.triton_kernels.prefix_kernels import statistics_base
from llama_adapter_kernels.triton_kernels.tiles import (
    LOG2E,
    MASK_NONE,
    apply_mask,
    choose_prefix,
    dot,
    dot_add,
    load_gate,
    load_tile,
    locate,
    loop_bound,
    offset,
    score_gradient,
    store_tile,
    tile_offsets,
    word_probabilities,
)

VARYING = (
    "gate_stride_prefix", "gate_stride_head", "mask_stride_batch", "mask_stride_head", "mask_stride_query",
    "mask_stride_key", "heads_q", "heads_kv", "group", "seq_q", "seq_k", "total_q", "total_k", "prefix_count",
    "prefix_length",
)  # fmt: skip


@triton.jit
def sweep_queries(
    dkey, dvalue, key, value, query_tile, doutput_tile, logsumexp_base, delta_base, mask_base,
    query_stride_head, query_stride, doutput_stride_head, doutput_stride, mask_stride_head, mask_stride_query,
    mask_stride_key, heads, statistics_stride_head, columns, column_valid, start_first, blocks, diagonal, queries,
    scale_log2,
    BLOCK_M: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, CHECK: tl.constexpr, CAUSAL: tl.constexpr,
    MASK: tl.constexpr, ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """Adds to dK / scale and dV, for each of `heads` query heads, `blocks` blocks of queries from row `start_first`.

    Negative rows are not there. Pointers are those of the first head. Without CHECK every row sees every valid key.
    Columns of keys that are not valid hold anything: they only reach rows of dK and dV that the caller zeroes.
    One loop over (head, block): with a loop in a loop, ptxas keeps the key and value tiles twice and spills.
    """
    start_end = start_first + blocks * BLOCK_M
    start = start_first
    head = start_first * 0
    for _ in tl.range(0, loop_bound(heads * blocks)):
        rows = start + tl.arange(0, BLOCK_M)
        row_valid = (rows >= 0) & (rows < queries)
        query_now = query_tile + offset(head, query_stride_head, ALIGNMENT) + offset(start, query_stride, ALIGNMENT)
        query = load_tile(query_now, row_valid, HEAD_DIM, BLOCK_D, CHECK)
        scores = dot(key, tl.trans(query))
        statistics = head.to(tl.int64) * statistics_stride_head + rows
        if CHECK:
            row_logsumexp = tl.load(logsumexp_base + statistics, mask=row_valid, other=0.0)
            row_delta = tl.load(delta_base + statistics, mask=row_valid, other=0.0)
            row_logsumexp = tl.where(row_logsumexp == float("-inf"), 0.0, row_logsumexp)
        else:
            row_logsumexp = tl.load(logsumexp_base + statistics)
            row_delta = tl.load(delta_base + statistics)
        visible = column_valid[:, None] & row_valid[None, :]
        if MASK != MASK_NONE:
            pointers = mask_base + offset(head, mask_stride_head, 1) + offset(rows, mask_stride_query, 1)[None, :]
            pointers += offset(columns, mask_stride_key, 1)[:, None]
            scores = apply_mask(scores * scale_log2, pointers, visible, MASK)
        probabilities = word_probabilities(scores, scale_log2, (row_logsumexp * LOG2E)[None, :], MASK != MASK_NONE)
        if CHECK:
            if CAUSAL:
                visible = visible & (columns[:, None] <= rows[None, :] + diagonal)
            probabilities = tl.where(visible, probabilities, 0.0)
        doutput_now = doutput_tile + offset(head, doutput_stride_head, ALIGNMENT)
        doutput_now += offset(start, doutput_stride, ALIGNMENT)
        doutput = load_tile(doutput_now, row_valid, HEAD_DIM, BLOCK_D, CHECK)
        dvalue = dot_add(probabilities.to(doutput.dtype), doutput, dvalue)
        dscores = score_gradient(probabilities, dot(value, tl.trans(doutput)), row_delta[None, :], CHECK)
        dkey = dot_add(dscores.to(query.dtype), query, dkey)
        start += BLOCK_M
        last_of_head = start >= start_end
        start = tl.where(last_of_head, start_first, start)
        head += last_of_head.to(tl.int32)
    return dkey, dvalue


@triton.jit(do_not_specialize=VARYING)
def key_gradient_kernel(
    query, key, value, doutput, logsumexp, delta, dkey, dvalue, mask, key_start, key_end, cu_seqlens_q, cu_seqlens_k,
    query_strides, key_strides, value_strides, doutput_strides, dkey_strides, dvalue_strides,
    mask_stride_batch, mask_stride_head, mask_stride_query, mask_stride_key,
    heads_kv, group, seq_q, seq_k, total_q, total_k, scale, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_N keys of one key/value head: all of dK and dV for them, zero where a key is not valid."""
    program = tl.program_id(0)
    column_blocks = tl.cdiv(seq_k, BLOCK_N)
    column_first = program % column_blocks * BLOCK_N  # causal: the first keys are seen by most queries
    head_kv = (program // column_blocks) % heads_kv
    b = program // (column_blocks * heads_kv)
    query_first, queries, key_first, keys, begin, end = locate(
        b, key_start, key_end, cu_seqlens_q, cu_seqlens_k, seq_q, seq_k, total_q, total_k
    )
    if column_first >= keys:
        return
    columns = column_first + tl.arange(0, BLOCK_N)
    column_valid = (columns >= begin) & (columns < end)
    key_base = key + offset(b, key_strides[0], ALIGNMENT) + offset(head_kv, key_strides[1], ALIGNMENT)
    k = load_tile(key_base + tile_offsets(key_first + columns, key_strides[2], HEAD_DIM, BLOCK_D, ALIGNMENT),
                  column_valid, HEAD_DIM, BLOCK_D, True)  # fmt: skip
    value_base = value + offset(b, value_strides[0], ALIGNMENT) + offset(head_kv, value_strides[1], ALIGNMENT)
    v = load_tile(value_base + tile_offsets(key_first + columns, value_strides[2], HEAD_DIM, BLOCK_D, ALIGNMENT),
                  column_valid, HEAD_DIM, BLOCK_D, True)  # fmt: skip

    # Rows that see a key of this block: from row_first; all of it: from row_whole. Blocks of rows end with the last
    # query, so that a partial block stands at the beginning, where the diagonal is tested anyway.
    diagonal = end - queries
    row_first = begin * 0
    row_whole = begin * 0
    if CAUSAL:
        row_first = tl.maximum(column_first - diagonal, 0)
        row_whole = tl.maximum(tl.minimum(column_first + BLOCK_N, end) - 1 - diagonal, 0)
    blocks = tl.cdiv(tl.maximum(queries - row_first, 0), BLOCK_M)
    blocks = tl.where((column_first < end) & (column_first + BLOCK_N > begin), blocks, 0)
    start_first = queries - blocks * BLOCK_M
    checked = tl.minimum(tl.cdiv(tl.maximum(row_whole - start_first, 0), BLOCK_M), blocks)
    # Rows of few keys are marked, and only checked blocks look for marks: see FEW_KEYS.
    checked = tl.where((column_first < begin) | (column_first + BLOCK_N > end), blocks, checked)
    if MASK != MASK_NONE:
        checked = blocks

    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    row = tl.arange(0, BLOCK_M)
    head = head_kv * group
    query_tile = (
        query + offset(b, query_strides[0], ALIGNMENT) + offset(head, query_strides[1], ALIGNMENT)
        + offset(query_first, query_strides[2], ALIGNMENT)
        + tile_offsets(row, query_strides[2], HEAD_DIM, BLOCK_D, ALIGNMENT)
    )  # fmt: skip
    doutput_tile = (
        doutput + offset(b, doutput_strides[0], ALIGNMENT) + offset(head, doutput_strides[1], ALIGNMENT)
        + offset(query_first, doutput_strides[2], ALIGNMENT)
        + tile_offsets(row, doutput_strides[2], HEAD_DIM, BLOCK_D, ALIGNMENT)
    )  # fmt: skip
    logsumexp_base = statistics_base(logsumexp, b, head, query_first, cu_seqlens_q, heads_kv * group, total_q)
    delta_base = statistics_base(delta, b, head, query_first, cu_seqlens_q, heads_kv * group, total_q)
    mask_base = head * 0
    if MASK != MASK_NONE:
        mask_base = mask + offset(b, mask_stride_batch, 1) + offset(head, mask_stride_head, 1)
    dk, dv = sweep_queries(
        dk, dv, k, v, query_tile, doutput_tile, logsumexp_base, delta_base, mask_base,
        query_strides[1], query_strides[2], doutput_strides[1], doutput_strides[2], mask_stride_head,
        mask_stride_query, mask_stride_key, group, total_q, columns, column_valid, start_first, checked, diagonal,
        queries, scale_log2, BLOCK_M, HEAD_DIM, BLOCK_D, True, CAUSAL, MASK, ALIGNMENT,
    )  # fmt: skip
    if MASK == MASK_NONE:
        dk, dv = sweep_queries(
            dk, dv, k, v, query_tile, doutput_tile, logsumexp_base, delta_base, mask_base,
            query_strides[1], query_strides[2], doutput_strides[1], doutput_strides[2], mask_stride_head,
            mask_stride_query, mask_stride_key, group, total_q, columns, column_valid, start_first + checked * BLOCK_M,
            blocks - checked, diagonal, queries, scale_log2, BLOCK_M, HEAD_DIM, BLOCK_D, False, CAUSAL, MASK,
            ALIGNMENT,
        )  # fmt: skip

    dk = tl.where(column_valid[:, None], dk * scale, 0.0)
    dv = tl.where(column_valid[:, None], dv, 0.0)
    column_exists = columns < keys
    dkey_base = dkey + offset(b, dkey_strides[0], ALIGNMENT) + offset(head_kv, dkey_strides[1], ALIGNMENT)
    store_tile(dkey_base + tile_offsets(key_first + columns, dkey_strides[2], HEAD_DIM, BLOCK_D, ALIGNMENT),
               dk, column_exists, HEAD_DIM, BLOCK_D)  # fmt: skip
    dvalue_base = dvalue + offset(b, dvalue_strides[0], ALIGNMENT) + offset(head_kv, dvalue_strides[1], ALIGNMENT)
    store_tile(dvalue_base + tile_offsets(key_first + columns, dvalue_strides[2], HEAD_DIM, BLOCK_D, ALIGNMENT),
               dv, column_exists, HEAD_DIM, BLOCK_D)  # fmt: skip


@triton.jit
def sweep_keys(
    dquery, query, doutput, key_tile, value_tile, mask_rows, key_stride, value_stride, mask_stride_key, row_logsumexp,
    row_delta, begin, blocks, last, row_limit, row_valid, scale_log2,
    BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, CHECK: tl.constexpr, MASK: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """Adds `blocks` blocks of keys from `begin` to dQ / scale, see `attend`. row_logsumexp: base 2, finite."""
    for block in tl.range(0, loop_bound(blocks)):
        start = begin + block * BLOCK_N
        columns = start + tl.arange(0, BLOCK_N)
        there = columns < last
        key = load_tile(key_tile + offset(start, key_stride, ALIGNMENT), there, HEAD_DIM, BLOCK_D, CHECK)
        value = load_tile(value_tile + offset(start, value_stride, ALIGNMENT), there, HEAD_DIM, BLOCK_D, CHECK)
        scores = dot(query, tl.trans(key))
        if MASK != MASK_NONE:
            pointers = mask_rows[:, None] + offset(columns, mask_stride_key, 1)[None, :]
            scores = apply_mask(scores * scale_log2, pointers, row_valid[:, None] & there[None, :], MASK)
        probabilities = word_probabilities(scores, scale_log2, row_logsumexp[:, None], MASK != MASK_NONE)
        if CHECK:
            probabilities = tl.where(columns[None, :] < row_limit[:, None], probabilities, 0.0)
        dscores = score_gradient(probabilities, dot(doutput, tl.trans(value)), row_delta[:, None], CHECK)
        dquery = dot_add(dscores.to(key.dtype), key, dquery)
    return dquery


@triton.jit(do_not_specialize=VARYING)
def query_gradient_kernel(
    query, key, value, prefix_key, prefix_value, gate, doutput, logsumexp, delta, prefix_logsumexp, prefix_delta,
    dquery, mask, key_start, key_end, prefix_index, cu_seqlens_q, cu_seqlens_k,
    query_strides, key_strides, value_strides, prefix_key_strides, prefix_value_strides, doutput_strides,
    dquery_strides,
    gate_stride_prefix, gate_stride_head, mask_stride_batch, mask_stride_head, mask_stride_query, mask_stride_key,
    heads_q, group, seq_q, seq_k, total_q, total_k, prefix_count, prefix_length, scale, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr, HAS_PREFIX: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_M queries of one head."""
    program = tl.program_id(0)
    row_blocks = tl.cdiv(seq_q, BLOCK_M)
    row_first = (row_blocks - 1 - program % row_blocks) * BLOCK_M  # longest first, as in the forward kernel
    head = (program // row_blocks) % heads_q
    b = program // (row_blocks * heads_q)
    query_first, queries, key_first, _, begin, end = locate(
        b, key_start, key_end, cu_seqlens_q, cu_seqlens_k, seq_q, seq_k, total_q, total_k
    )
    if row_first >= queries:
        return
    rows = row_first + tl.arange(0, BLOCK_M)
    row_valid = rows < queries
    head_kv = head // group
    query_base = query + offset(b, query_strides[0], ALIGNMENT) + offset(head, query_strides[1], ALIGNMENT)
    q = load_tile(query_base + tile_offsets(query_first + rows, query_strides[2], HEAD_DIM, BLOCK_D, ALIGNMENT),
                  row_valid, HEAD_DIM, BLOCK_D, True)  # fmt: skip
    doutput_base = doutput + offset(b, doutput_strides[0], ALIGNMENT) + offset(head, doutput_strides[1], ALIGNMENT)
    do = load_tile(doutput_base + tile_offsets(query_first + rows, doutput_strides[2], HEAD_DIM, BLOCK_D, ALIGNMENT),
                   row_valid, HEAD_DIM, BLOCK_D, True)  # fmt: skip
    logsumexp_base = statistics_base(logsumexp, b, head, query_first, cu_seqlens_q, heads_q, total_q)
    row_logsumexp = tl.load(logsumexp_base + rows, mask=row_valid, other=0.0) * LOG2E
    row_logsumexp = tl.where(row_logsumexp == float("-inf"), 0.0, row_logsumexp)
    delta_base = statistics_base(delta, b, head, query_first, cu_seqlens_q, heads_q, total_q)
    row_delta = tl.load(delta_base + rows, mask=row_valid, other=0.0)

    column = tl.arange(0, BLOCK_N)
    key_tile = (
        key + offset(b, key_strides[0], ALIGNMENT) + offset(head_kv, key_strides[1], ALIGNMENT)
        + offset(key_first, key_strides[2], ALIGNMENT)
        + tile_offsets(column, key_strides[2], HEAD_DIM, BLOCK_D, ALIGNMENT)
    )  # fmt: skip
    value_tile = (
        value + offset(b, value_strides[0], ALIGNMENT) + offset(head_kv, value_strides[1], ALIGNMENT)
        + offset(key_first, value_strides[2], ALIGNMENT)
        + tile_offsets(column, value_strides[2], HEAD_DIM, BLOCK_D, ALIGNMENT)
    )  # fmt: skip
    mask_rows = rows
    if MASK != MASK_NONE:
        mask_base = mask + offset(b, mask_stride_batch, 1) + offset(head, mask_stride_head, 1)
        mask_rows = mask_base + offset(rows, mask_stride_query, 1)
    row_limit = tl.zeros([BLOCK_M], tl.int32) + end
    if CAUSAL:
        row_limit = tl.minimum(end, rows + (end - queries) + 1)
    row_last = tl.minimum(row_first + BLOCK_M, queries)
    whole, blocks, last = visible_blocks(row_first, row_last, queries, begin, end, CAUSAL, MASK != MASK_NONE, BLOCK_N)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if MASK == MASK_NONE:
        dq = sweep_keys(
            dq, q, do, key_tile, value_tile, mask_rows, key_strides[2], value_strides[2], mask_stride_key,
            row_logsumexp, row_delta, begin, whole, last, row_limit, row_valid, scale_log2,
            BLOCK_N, HEAD_DIM, BLOCK_D, False, MASK, ALIGNMENT,
        )  # fmt: skip
    dq = sweep_keys(
        dq, q, do, key_tile, value_tile, mask_rows, key_strides[2], value_strides[2], mask_stride_key,
        row_logsumexp, row_delta, begin + whole * BLOCK_N, blocks - whole, last, row_limit, row_valid, scale_log2,
        BLOCK_N, HEAD_DIM, BLOCK_D, True, MASK, ALIGNMENT,
    )  # fmt: skip

    if HAS_PREFIX:
        entry, slots, bad = choose_prefix(b, prefix_index, prefix_count, prefix_length)
        gate_value = load_gate(gate, entry, head, slots, bad, gate_stride_prefix, gate_stride_head)
        prefix_key_base = (prefix_key + offset(entry, prefix_key_strides[0], ALIGNMENT)
                           + offset(head_kv, prefix_key_strides[1], ALIGNMENT))  # fmt: skip
        prefix_value_base = (prefix_value + offset(entry, prefix_value_strides[0], ALIGNMENT)
                             + offset(head_kv, prefix_value_strides[1], ALIGNMENT))  # fmt: skip
        statistics = statistics_base(prefix_logsumexp, b, head, query_first, cu_seqlens_q, heads_q, total_q)
        row_logsumexp = tl.load(statistics + rows, mask=row_valid, other=0.0)
        statistics = statistics_base(prefix_delta, b, head, query_first, cu_seqlens_q, heads_q, total_q)
        row_delta = tl.load(statistics + rows, mask=row_valid, other=0.0)
        for tile in tl.range(0, loop_bound(tl.cdiv(slots, BLOCK_P))):
            slot = tile * BLOCK_P + tl.arange(0, BLOCK_P)
            prefix_k = load_tile(
                prefix_key_base + tile_offsets(slot, prefix_key_strides[2], HEAD_DIM, BLOCK_D, ALIGNMENT),
                slot < slots, HEAD_DIM, BLOCK_D, True,
            )  # fmt: skip
            prefix_v = load_tile(
                prefix_value_base + tile_offsets(slot, prefix_value_strides[2], HEAD_DIM, BLOCK_D, ALIGNMENT),
                slot < slots, HEAD_DIM, BLOCK_D, True,
            )  # fmt: skip
            probabilities = word_probabilities(dot(q, tl.trans(prefix_k)), scale_log2, row_logsumexp[:, None], False)
            probabilities = tl.where((slot < slots)[None, :], probabilities, 0.0)
            dscores = gate_value * score_gradient(probabilities, dot(do, tl.trans(prefix_v)), row_delta[:, None], True)
            dq = dot_add(dscores.to(prefix_k.dtype), prefix_k, dq)

    dquery_base = dquery + offset(b, dquery_strides[0], ALIGNMENT) + offset(head, dquery_strides[1], ALIGNMENT)
    store_tile(dquery_base + tile_offsets(query_first + rows, dquery_strides[2], HEAD_DIM, BLOCK_D, ALIGNMENT),
               dq * scale, row_valid, HEAD_DIM, BLOCK_D)  # fmt: skip
