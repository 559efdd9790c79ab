# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Backward, the part that is linear in the sequence: row statistics and the gradients of prefix and gate.

    D_p = rowsum(P_p * (dO Vp^T))    D_w = rowsum(dO * O) - gate * D_p    dgate = sum of D_p
    dVp = gate P_p^T dO              dKp = scale gate (P_p * (dO Vp^T - D_p))^T Q

One program walks over a chunk of one head's rows and reads Q, dO and O once; the gradients of a prefix of one tile stay in
registers meanwhile. A frozen lowest layer asks for nothing else, and then only this kernel runs. Sums over chunks, heads
of a group and sequences are added in a fixed order afterwards: gradients are deterministic.

O is saved rounded. Where a row sees few keys dP - D_w cancels and the rounding of O would be all that is left, and where
O has overflowed nothing is left at all. Such rows take D_w = sum(P * dP) from the keys themselves.
"""

import triton
import triton.language as tl

from llama_adapter_kernels.triton_kernels.prefix import (
    PREFIX_NONE,
    PREFIX_ONE_TILE,
    load_slots,
    prefix_scores_by_slot,
    prefix_softmax,
)
from llama_adapter_kernels.triton_kernels.problem import (
    choose_prefix,
    load_gate,
    locate_rows,
    packed_tokens,
    statistic_row,
    valid_keys,
)
from llama_adapter_kernels.triton_kernels.scores import (
    FEW_KEYS,
    MASK_NONE,
    mark_delta,
    masked_probabilities,
    row_windows,
    score_gradient,
    visible,
)
from llama_adapter_kernels.triton_kernels.tiles import (
    LOG2E,
    dot,
    dot_add,
    head_rows,
    load_rows,
    load_tile,
    loop_bound,
    offset,
    store_tile,
    tile_offsets,
)

VARYING = (
    "gate_stride_prefix", "gate_stride_head", "mask_stride_batch", "mask_stride_head", "mask_stride_query",
    "mask_stride_key", "heads_q", "group", "seq_q", "seq_k", "total_q", "total_k", "sequences", "search_steps",
    "prefix_count", "prefix_length", "chunks",
)  # fmt: skip


@triton.jit
def delta_of_keys(
    query, doutput, key_tile, value_tile, mask_rows, key_stride, value_stride, mask_stride_key, row_logsumexp, row_begin,
    row_end, row_valid, begin, last, scale_log2,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, MASK: tl.constexpr,
    TOKENS: tl.constexpr, ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """D_w = sum(P * dP) / sum(P) of each row over the keys begin..last-1, see `attend`.

    Also whether at most one probability is not zero: that one is 1, and the scores have no gradient.
    """
    total = tl.zeros([BLOCK_M], tl.float32)
    weighted = tl.zeros([BLOCK_M], tl.float32)
    count = tl.zeros([BLOCK_M], tl.int32)
    for block in tl.range(0, loop_bound(tl.cdiv(tl.maximum(last - begin, 0), BLOCK_N))):
        start = begin + block * BLOCK_N
        columns = start + tl.arange(0, BLOCK_N)
        there = columns < last
        key = load_tile(key_tile + offset(start, key_stride, ALIGNMENT), there, HEAD_DIM, BLOCK_D, True)
        value = load_tile(value_tile + offset(start, value_stride, ALIGNMENT), there, HEAD_DIM, BLOCK_D, True)
        probabilities = masked_probabilities(
            dot(query, tl.trans(key)), scale_log2, row_logsumexp[:, None], mask_rows[:, None],
            offset(columns, mask_stride_key, 1)[None, :], there[None, :], row_valid[:, None], MASK,
        )  # fmt: skip
        probabilities = tl.where(visible(columns, row_begin, row_end, TOKENS), probabilities, 0.0)
        total += tl.sum(probabilities, 1)
        weighted += tl.sum(probabilities * dot(doutput, tl.trans(value)), 1)
        count += tl.sum((probabilities > 0.0).to(tl.int32), 1)
    return weighted / tl.where(total == 0.0, 1.0, total), count <= 1


@triton.jit(do_not_specialize=VARYING)
def backward_rows_kernel(
    query, key, value, doutput, output, logsumexp, prefix_key, prefix_value, gate, mask, key_start, key_end,
    prefix_index, cu_seqlens_q, cu_seqlens_k,
    statistics, windows, prefix_logsumexp, prefix_delta, dprefix_partial, dgate_partial,
    query_strides, key_strides, value_strides, doutput_strides, output_strides, prefix_key_strides,
    prefix_value_strides,
    gate_stride_prefix, gate_stride_head, mask_stride_batch, mask_stride_head, mask_stride_query, mask_stride_key,
    heads_q, group, seq_q, seq_k, total_q, total_k, sequences, search_steps, prefix_count, prefix_length, chunks,
    scale, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
    PREFIX: tl.constexpr, NEED_DELTA: tl.constexpr, NEED_PREFIX: tl.constexpr, CAUSAL: tl.constexpr,
    MASK: tl.constexpr, TOKENS: tl.constexpr, ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """Program (sequence, head, chunk). NEED_DELTA: writes the statistics [.., rows, 2] of the words, log-sum-exp in base 2
    and D_w, and with TOKENS the windows [T, 2] of the rows.

    A prefix of one tile: with NEED_PREFIX its gradients over the chunk, dprefix_partial [B, Hq, chunks, 2, P, D] (dKp,
    then dVp, float32; B = 1 with TOKENS). A longer one: its log-sum-exp (base 2) and D_p of each row, for the kernels
    that follow. dgate_partial [B, Hq, chunks]: the sum of D_p.
    Both D are +inf where the scores have no gradient, see `mark_delta`.
    """
    program = tl.program_id(0)
    chunk = program % chunks
    head = (program // chunks) % heads_q
    b = program // (chunks * heads_q)
    query_first = b * 0
    queries = seq_q + 0
    key_first = b * 0
    keys = seq_k + 0
    row_low = b * 0  # the valid rows are row_low..row_high-1
    if TOKENS:
        row_low, row_high = packed_tokens(cu_seqlens_q, sequences, total_q)
    else:
        query_first, queries = locate_rows(b, cu_seqlens_q, seq_q, total_q)
        key_first, keys = locate_rows(b, cu_seqlens_k, seq_k, total_k)
        row_high = queries
    begin, end = valid_keys(b, key_start, key_end, keys)
    head_kv = head // group
    statistic = statistic_row(b, head, query_first, heads_q, total_q, cu_seqlens_q is not None)

    if PREFIX != PREFIX_NONE:
        entry, slots, bad = choose_prefix(b, prefix_index, prefix_count, prefix_length)
        gate_value = load_gate(gate, entry, head, slots, bad, gate_stride_prefix, gate_stride_head)
        slot = tl.arange(0, BLOCK_P)
        dgate = (slots * 0).to(tl.float32)
        dprefix_k = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
        dprefix_v = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
        if PREFIX == PREFIX_ONE_TILE:
            prefix_k = load_slots(prefix_key, entry, head_kv, slots * 0, slots, prefix_key_strides,
                                  BLOCK_P, HEAD_DIM, BLOCK_D, ALIGNMENT)  # fmt: skip
            prefix_v = load_slots(prefix_value, entry, head_kv, slots * 0, slots, prefix_value_strides,
                                  BLOCK_P, HEAD_DIM, BLOCK_D, ALIGNMENT)  # fmt: skip

    tiles = tl.cdiv(queries, BLOCK_M)
    tiles_per_chunk = tl.cdiv(tiles, chunks)
    first_tile = chunk * tiles_per_chunk
    last_tile = tl.minimum(first_tile + tiles_per_chunk, tiles)
    for tile in tl.range(loop_bound(first_tile), loop_bound(last_tile)):
        rows = b * 0 + tile * BLOCK_M + tl.arange(0, BLOCK_M)
        row_valid = (rows >= row_low) & (rows < row_high)
        do = load_rows(doutput, b, head, query_first, rows, row_valid, doutput_strides, HEAD_DIM, BLOCK_D, ALIGNMENT)
        row_delta = tl.zeros([BLOCK_M], tl.float32)
        if NEED_DELTA:
            o = load_rows(output, b, head, query_first, rows, row_valid, output_strides, HEAD_DIM, BLOCK_D, ALIGNMENT)
            row_delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)

        if PREFIX != PREFIX_NONE:
            q = load_rows(query, b, head, query_first, rows, row_valid, query_strides, HEAD_DIM, BLOCK_D, ALIGNMENT)
            if PREFIX == PREFIX_ONE_TILE:
                probabilities = prefix_softmax(prefix_scores_by_slot(prefix_k, q, slot, slots, scale_log2), 0)
                dprobabilities = dot(prefix_v, tl.trans(do))
                row_prefix_delta = tl.sum(probabilities * dprobabilities, 0)
                if NEED_PREFIX:
                    marked = mark_delta(row_prefix_delta, slots == 1)
                    dscores = score_gradient(probabilities, dprobabilities, marked[None, :], True)
                    dprefix_v = dot_add(probabilities.to(do.dtype), do, dprefix_v)
                    dprefix_k = dot_add(dscores.to(q.dtype), q, dprefix_k)
            else:
                largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
                total = tl.zeros([BLOCK_M], tl.float32)
                weighted = tl.zeros([BLOCK_M], tl.float32)  # sum of probabilities * (dO Vp^T), before normalisation
                for slot_tile in tl.range(0, loop_bound(tl.cdiv(slots, BLOCK_P))):
                    first = slots * 0 + slot_tile * BLOCK_P
                    tile_k = load_slots(prefix_key, entry, head_kv, first, slots, prefix_key_strides,
                                        BLOCK_P, HEAD_DIM, BLOCK_D, ALIGNMENT)  # fmt: skip
                    tile_v = load_slots(prefix_value, entry, head_kv, first, slots, prefix_value_strides,
                                        BLOCK_P, HEAD_DIM, BLOCK_D, ALIGNMENT)  # fmt: skip
                    scores = prefix_scores_by_slot(tile_k, q, first + slot, slots, scale_log2)
                    new_largest = tl.maximum(largest, tl.max(scores, 0))
                    rescale = tl.exp2(largest - new_largest)
                    weights = tl.exp2(scores - new_largest[None, :])
                    total = total * rescale + tl.sum(weights, 0)
                    weighted = weighted * rescale + tl.sum(weights * dot(tile_v, tl.trans(do)), 0)
                    largest = new_largest
                none = total == 0.0  # a sequence without a prefix
                row_prefix_delta = tl.where(none, 0.0, weighted / tl.where(none, 1.0, total))
                row_prefix_logsumexp = tl.where(none, 0.0, largest + tl.log2(tl.where(none, 1.0, total)))
                tl.store(prefix_logsumexp + statistic + rows, row_prefix_logsumexp, mask=row_valid)
                tl.store(prefix_delta + statistic + rows, mark_delta(row_prefix_delta, slots == 1), mask=row_valid)
            row_delta -= gate_value * row_prefix_delta
            dgate += tl.sum(tl.where(row_valid, row_prefix_delta, 0.0), 0)

        if NEED_DELTA:
            row_logsumexp = tl.load(logsumexp + statistic + rows, mask=row_valid, other=0.0)
            row_logsumexp = tl.where(row_logsumexp == float("-inf"), 0.0, row_logsumexp * LOG2E)
            row_begin, row_end = row_windows(
                rows, queries, begin, end, cu_seqlens_q, cu_seqlens_k, total_q, total_k, sequences, search_steps,
                CAUSAL, TOKENS,
            )  # fmt: skip
            if TOKENS:
                tl.store(windows + 2 * rows, row_begin, mask=row_valid & (head == 0))
                tl.store(windows + 2 * rows + 1, row_end, mask=row_valid & (head == 0))
            infinite = (tl.abs(row_delta) < float("inf")) == 0  # or NaN
            few = row_valid & (row_end - row_begin < FEW_KEYS)
            if MASK != MASK_NONE:  # who knows how many keys the mask leaves
                few = row_valid
            from_keys = few | (row_valid & infinite)
            last = tl.max(tl.where(from_keys, row_end, 0), 0)
            first = tl.min(tl.where(from_keys, row_begin, last), 0)
            if last > first:
                if PREFIX == PREFIX_NONE:
                    q = load_rows(
                        query, b, head, query_first, rows, row_valid, query_strides, HEAD_DIM, BLOCK_D, ALIGNMENT
                    )
                column = tl.arange(0, BLOCK_N)
                key_tile = head_rows(key, b, head_kv, key_first, key_strides, ALIGNMENT)
                key_tile += tile_offsets(column, key_strides[2], BLOCK_D, ALIGNMENT)
                value_tile = head_rows(value, b, head_kv, key_first, value_strides, ALIGNMENT)
                value_tile += tile_offsets(column, value_strides[2], BLOCK_D, ALIGNMENT)
                mask_rows = rows
                if MASK != MASK_NONE:
                    mask_base = mask + offset(b, mask_stride_batch, 1) + offset(head, mask_stride_head, 1)
                    mask_rows = mask_base + offset(rows, mask_stride_query, 1)
                exact, one_key = delta_of_keys(
                    q, do, key_tile, value_tile, mask_rows, key_strides[2], value_strides[2], mask_stride_key,
                    row_logsumexp, row_begin, row_end, row_valid, first, last, scale_log2,
                    BLOCK_M, BLOCK_N, HEAD_DIM, BLOCK_D, MASK, TOKENS, ALIGNMENT,
                )  # fmt: skip
                row_delta = tl.where(from_keys, mark_delta(exact, few & one_key), row_delta)
            pair = statistics + 2 * (statistic + rows)
            tl.store(pair, row_logsumexp, mask=row_valid)
            tl.store(pair + 1, row_delta, mask=row_valid)

    if PREFIX != PREFIX_NONE and NEED_PREFIX:
        part = (b.to(tl.int64) * heads_q + head) * chunks + chunk
        tl.store(dgate_partial + part, dgate)
        if PREFIX == PREFIX_ONE_TILE:
            size = prefix_length.to(tl.int64) * HEAD_DIM
            pointers = dprefix_partial + part * 2 * size + tile_offsets(slot, HEAD_DIM, BLOCK_D, 1)
            stored = slot < prefix_length
            store_tile(pointers, dprefix_k * (gate_value * scale), stored, HEAD_DIM, BLOCK_D)
            store_tile(pointers + size, dprefix_v * gate_value, stored, HEAD_DIM, BLOCK_D)
