# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Backward, the part that is linear in the sequence: row statistics and the gradients of prefix and gate.

    D_p = rowsum(P_p * (dO Vp^T))    D_w = rowsum(dO * O) - gate * D_p    dgate = sum of D_p
    dVp = gate P_p^T dO              dKp = scale gate (P_p * (dO Vp^T - D_p))^T Q

A frozen lowest layer asks for nothing else, and then only these kernels run. Sums over rows, heads of a group and
sequences go through partial sums that are added in a fixed order: gradients are deterministic.

O is saved rounded. Where a row sees few keys dP - D_w cancels and the rounding of O would be all that is left, and where
O has overflowed nothing is left at all. Such rows take D_w = sum(P * dP) from the keys themselves.
"""

import triton
import triton.language as tl

from llama_adapter_kernels.triton_kernels.tiles import (
    LOG2E,
    MASK_NONE,
    apply_mask,
    choose_prefix,
    dot,
    dot_add,
    load_gate,
    load_tile,
    locate_keys,
    locate_queries,
    loop_bound,
    mark_delta,
    offset,
    prefix_scores,
    score_gradient,
    store_tile,
    tile_offsets,
    valid_keys,
    word_probabilities,
)

# A row with fewer visible keys takes D_w from them, and may be marked as without a gradient. No block of keys is smaller,
# so that a block all of whose keys are seen holds no marked row.
FEW_KEYS = tl.constexpr(16)

VARYING = (
    "gate_stride_prefix", "gate_stride_head", "mask_stride_batch", "mask_stride_head", "mask_stride_query",
    "mask_stride_key", "heads_q", "group", "seq_q", "seq_k", "total_q", "total_k", "prefix_count", "prefix_length",
    "splits",
)  # fmt: skip


@triton.jit
def statistics_base(statistics, b, head, first, cu_seqlens_q, heads_q, total_q):
    """Pointer to the first row's entry of a [B, Hq, Sq] (packed: [Hq, T]) statistic."""
    base = statistics + head.to(tl.int64) * total_q + first
    if cu_seqlens_q is None:
        base += b.to(tl.int64) * heads_q * total_q
    return base


@triton.jit
def delta_of_keys(
    query, doutput, key_tile, value_tile, mask_rows, key_stride, value_stride, mask_stride_key, row_logsumexp, row_limit,
    row_valid, begin, blocks, last, scale_log2,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, MASK: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """D_w = sum(P * dP) / sum(P) over `blocks` blocks of keys from `begin`, see `attend`; row_logsumexp: base 2, finite.

    Also whether at most one probability is not zero: that one is 1, and the scores have no gradient.
    """
    total = tl.zeros([BLOCK_M], tl.float32)
    weighted = tl.zeros([BLOCK_M], tl.float32)
    count = tl.zeros([BLOCK_M], tl.int32)
    for block in tl.range(0, loop_bound(blocks)):
        start = begin + block * BLOCK_N
        columns = start + tl.arange(0, BLOCK_N)
        there = columns < last
        key = load_tile(key_tile + offset(start, key_stride, ALIGNMENT), there, HEAD_DIM, BLOCK_D, True)
        value = load_tile(value_tile + offset(start, value_stride, ALIGNMENT), there, HEAD_DIM, BLOCK_D, True)
        scores = dot(query, tl.trans(key))
        if MASK != MASK_NONE:
            pointers = mask_rows[:, None] + offset(columns, mask_stride_key, 1)[None, :]
            scores = apply_mask(scores * scale_log2, pointers, row_valid[:, None] & there[None, :], MASK)
        probabilities = word_probabilities(scores, scale_log2, row_logsumexp[:, None], MASK != MASK_NONE)
        probabilities = tl.where(columns[None, :] < row_limit[:, None], probabilities, 0.0)
        total += tl.sum(probabilities, 1)
        weighted += tl.sum(probabilities * dot(doutput, tl.trans(value)), 1)
        count += tl.sum((probabilities > 0.0).to(tl.int32), 1)
    return weighted / tl.where(total == 0.0, 1.0, total), count <= 1


@triton.jit(do_not_specialize=VARYING)
def statistics_kernel(
    query, key, value, doutput, output, logsumexp, prefix_key, prefix_value, gate, mask, key_start, key_end,
    prefix_index, cu_seqlens_q, cu_seqlens_k, delta, prefix_logsumexp, prefix_delta, dgate_partial,
    query_strides, key_strides, value_strides, doutput_strides, output_strides, prefix_key_strides,
    prefix_value_strides,
    gate_stride_prefix, gate_stride_head, mask_stride_batch, mask_stride_head, mask_stride_query, mask_stride_key,
    heads_q, group, seq_q, seq_k, total_q, total_k, prefix_count, prefix_length, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
    HAS_PREFIX: tl.constexpr, NEED_DELTA: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """Per row: delta = D_w, the prefix's log-sum-exp (base 2) and D_p; per block of rows: the sum of D_p.

    Both D are +inf where the scores have no gradient, see `delta_of_keys` and `score_gradient`.
    """
    program = tl.program_id(0)
    row_blocks = tl.cdiv(seq_q, BLOCK_M)
    block = program % row_blocks
    head = (program // row_blocks) % heads_q
    b = program // (row_blocks * heads_q)
    query_first, queries = locate_queries(b, cu_seqlens_q, seq_q, total_q)
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    row_valid = rows < queries
    doutput_tile = (
        doutput + offset(b, doutput_strides[0], ALIGNMENT) + offset(head, doutput_strides[1], ALIGNMENT)
        + tile_offsets(query_first + rows, doutput_strides[2], HEAD_DIM, BLOCK_D, ALIGNMENT)
    )  # fmt: skip
    do = load_tile(doutput_tile, row_valid, HEAD_DIM, BLOCK_D, True)
    row_delta = tl.zeros([BLOCK_M], tl.float32)
    if NEED_DELTA:
        output_tile = (
            output + offset(b, output_strides[0], ALIGNMENT) + offset(head, output_strides[1], ALIGNMENT)
            + tile_offsets(query_first + rows, output_strides[2], HEAD_DIM, BLOCK_D, ALIGNMENT)
        )  # fmt: skip
        o = load_tile(output_tile, row_valid, HEAD_DIM, BLOCK_D, True)
        row_delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)

    if HAS_PREFIX:
        entry, slots, bad = choose_prefix(b, prefix_index, prefix_count, prefix_length)
        gate_value = load_gate(gate, entry, head, slots, bad, gate_stride_prefix, gate_stride_head)
        query_tile = (
            query + offset(b, query_strides[0], ALIGNMENT) + offset(head, query_strides[1], ALIGNMENT)
            + tile_offsets(query_first + rows, query_strides[2], HEAD_DIM, BLOCK_D, ALIGNMENT)
        )  # fmt: skip
        q = load_tile(query_tile, row_valid, HEAD_DIM, BLOCK_D, True)
        head_kv = head // group
        key_base = (prefix_key + offset(entry, prefix_key_strides[0], ALIGNMENT)
                    + offset(head_kv, prefix_key_strides[1], ALIGNMENT))  # fmt: skip
        value_base = (prefix_value + offset(entry, prefix_value_strides[0], ALIGNMENT)
                      + offset(head_kv, prefix_value_strides[1], ALIGNMENT))  # fmt: skip
        largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        weighted = tl.zeros([BLOCK_M], tl.float32)  # sum of probabilities * (dO Vp^T), before normalisation
        for tile in tl.range(0, loop_bound(tl.cdiv(slots, BLOCK_P))):
            slot = tile * BLOCK_P + tl.arange(0, BLOCK_P)
            prefix_k = load_tile(key_base + tile_offsets(slot, prefix_key_strides[2], HEAD_DIM, BLOCK_D, ALIGNMENT),
                                 slot < slots, HEAD_DIM, BLOCK_D, True)  # fmt: skip
            prefix_v = load_tile(
                value_base + tile_offsets(slot, prefix_value_strides[2], HEAD_DIM, BLOCK_D, ALIGNMENT),
                slot < slots, HEAD_DIM, BLOCK_D, True,
            )  # fmt: skip
            scores = prefix_scores(q, prefix_k, slot, slots, scale_log2)
            new_largest = tl.maximum(largest, tl.max(scores, 1))
            rescale = tl.exp2(largest - new_largest)
            weights = tl.exp2(scores - new_largest[:, None])
            total = total * rescale + tl.sum(weights, 1)
            weighted = weighted * rescale + tl.sum(weights * dot(do, tl.trans(prefix_v)), 1)
            largest = new_largest
        none = total == 0.0  # a sequence without a prefix
        row_prefix_delta = tl.where(none, 0.0, weighted / tl.where(none, 1.0, total))
        row_prefix_logsumexp = tl.where(none, 0.0, largest + tl.log2(tl.where(none, 1.0, total)))
        row_delta -= gate_value * row_prefix_delta
        logsumexp_base = statistics_base(prefix_logsumexp, b, head, query_first, cu_seqlens_q, heads_q, total_q)
        tl.store(logsumexp_base + rows, row_prefix_logsumexp, mask=row_valid)
        delta_base = statistics_base(prefix_delta, b, head, query_first, cu_seqlens_q, heads_q, total_q)
        tl.store(delta_base + rows, mark_delta(row_prefix_delta, slots == 1), mask=row_valid)
        in_block = tl.sum(tl.where(row_valid, row_prefix_delta, 0.0), 0)
        tl.store(dgate_partial + (b.to(tl.int64) * heads_q + head) * row_blocks + block, in_block)
    if NEED_DELTA:
        key_first, keys = locate_keys(b, cu_seqlens_k, seq_k, total_k)
        begin, end = valid_keys(b, key_start, key_end, keys)
        row_limit = tl.zeros([BLOCK_M], tl.int32) + end
        if CAUSAL:
            row_limit = tl.minimum(end, rows + (end - queries) + 1)
        infinite = (tl.abs(row_delta) < float("inf")) == 0  # or NaN
        few = row_valid & (row_limit - begin < FEW_KEYS)
        if MASK != MASK_NONE:  # who knows how many keys the mask leaves
            few = row_valid
        from_keys = few | (row_valid & infinite)
        last = tl.max(tl.where(from_keys, row_limit, begin), 0)
        if last > begin:
            q = load_tile(
                query + offset(b, query_strides[0], ALIGNMENT) + offset(head, query_strides[1], ALIGNMENT)
                + tile_offsets(query_first + rows, query_strides[2], HEAD_DIM, BLOCK_D, ALIGNMENT),
                row_valid, HEAD_DIM, BLOCK_D, True,
            )  # fmt: skip
            column = tl.arange(0, BLOCK_N)
            key_tile = (
                key + offset(b, key_strides[0], ALIGNMENT) + offset(head // group, key_strides[1], ALIGNMENT)
                + tile_offsets(key_first + column, key_strides[2], HEAD_DIM, BLOCK_D, ALIGNMENT)
            )  # fmt: skip
            value_tile = (
                value + offset(b, value_strides[0], ALIGNMENT) + offset(head // group, value_strides[1], ALIGNMENT)
                + tile_offsets(key_first + column, value_strides[2], HEAD_DIM, BLOCK_D, ALIGNMENT)
            )  # fmt: skip
            mask_rows = rows
            if MASK != MASK_NONE:
                mask_base = mask + offset(b, mask_stride_batch, 1) + offset(head, mask_stride_head, 1)
                mask_rows = mask_base + offset(rows, mask_stride_query, 1)
            base = statistics_base(logsumexp, b, head, query_first, cu_seqlens_q, heads_q, total_q)
            row_logsumexp = tl.load(base + rows, mask=row_valid, other=0.0) * LOG2E
            row_logsumexp = tl.where(row_logsumexp == float("-inf"), 0.0, row_logsumexp)
            exact, one_key = delta_of_keys(
                q, do, key_tile, value_tile, mask_rows, key_strides[2], value_strides[2], mask_stride_key,
                row_logsumexp, row_limit, row_valid, begin, tl.cdiv(last - begin, BLOCK_N), last, scale_log2,
                BLOCK_M, BLOCK_N, HEAD_DIM, BLOCK_D, MASK, ALIGNMENT,
            )  # fmt: skip
            row_delta = tl.where(from_keys, mark_delta(exact, few & one_key), row_delta)
        base = statistics_base(delta, b, head, query_first, cu_seqlens_q, heads_q, total_q)
        tl.store(base + rows, row_delta, mask=row_valid)


@triton.jit(do_not_specialize=VARYING)
def prefix_gradient_kernel(
    query, doutput, prefix_key, prefix_value, gate, prefix_index, cu_seqlens_q, prefix_logsumexp, prefix_delta, partial,
    query_strides, doutput_strides, prefix_key_strides, prefix_value_strides,
    gate_stride_prefix, gate_stride_head, heads_q, group, seq_q, total_q, prefix_count, prefix_length, splits,
    scale, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """One program sums BLOCK_P slots of dKp and dVp over one of `splits` stretches of one head's rows.

    Writes partial [B, Hq, splits, 2, P, D] (dKp, then dVp) in float32.
    """
    program = tl.program_id(0)
    split = program % splits
    slot_blocks = tl.cdiv(prefix_length, BLOCK_P)
    slot = (program // splits) % slot_blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    head = (program // (splits * slot_blocks)) % heads_q
    b = program // (splits * slot_blocks * heads_q)
    query_first, queries = locate_queries(b, cu_seqlens_q, seq_q, total_q)
    entry, slots, bad = choose_prefix(b, prefix_index, prefix_count, prefix_length)
    gate_value = load_gate(gate, entry, head, slots, bad, gate_stride_prefix, gate_stride_head)
    head_kv = head // group
    prefix_key_tile = (
        prefix_key + offset(entry, prefix_key_strides[0], ALIGNMENT)
        + offset(head_kv, prefix_key_strides[1], ALIGNMENT)
        + tile_offsets(slot, prefix_key_strides[2], HEAD_DIM, BLOCK_D, ALIGNMENT)
    )  # fmt: skip
    prefix_value_tile = (
        prefix_value + offset(entry, prefix_value_strides[0], ALIGNMENT)
        + offset(head_kv, prefix_value_strides[1], ALIGNMENT)
        + tile_offsets(slot, prefix_value_strides[2], HEAD_DIM, BLOCK_D, ALIGNMENT)
    )  # fmt: skip
    prefix_k = load_tile(prefix_key_tile, slot < slots, HEAD_DIM, BLOCK_D, True)
    prefix_v = load_tile(prefix_value_tile, slot < slots, HEAD_DIM, BLOCK_D, True)
    query_base = query + offset(b, query_strides[0], ALIGNMENT) + offset(head, query_strides[1], ALIGNMENT)
    doutput_base = doutput + offset(b, doutput_strides[0], ALIGNMENT) + offset(head, doutput_strides[1], ALIGNMENT)
    logsumexp_base = statistics_base(prefix_logsumexp, b, head, query_first, cu_seqlens_q, heads_q, total_q)
    delta_base = statistics_base(prefix_delta, b, head, query_first, cu_seqlens_q, heads_q, total_q)

    blocks = tl.cdiv(queries, BLOCK_M)
    blocks_per_split = tl.cdiv(blocks, splits)
    first_block = split * blocks_per_split
    last_block = tl.minimum(first_block + blocks_per_split, blocks)
    dprefix_k = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    dprefix_v = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    for block in tl.range(loop_bound(first_block), loop_bound(last_block)):
        rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
        row_valid = rows < queries
        q = load_tile(query_base + tile_offsets(query_first + rows, query_strides[2], HEAD_DIM, BLOCK_D, ALIGNMENT),
                      row_valid, HEAD_DIM, BLOCK_D, True)  # fmt: skip
        do = load_tile(
            doutput_base + tile_offsets(query_first + rows, doutput_strides[2], HEAD_DIM, BLOCK_D, ALIGNMENT),
            row_valid, HEAD_DIM, BLOCK_D, True,
        )  # fmt: skip
        row_logsumexp = tl.load(logsumexp_base + rows, mask=row_valid, other=float("inf"))
        row_delta = tl.load(delta_base + rows, mask=row_valid, other=0.0)
        # Slots beyond P give rows of their own here, which are not stored.
        probabilities = word_probabilities(dot(prefix_k, tl.trans(q)), scale_log2, row_logsumexp[None, :], False)
        # All slots are here, as a rule: their sum takes out what rounding of a large log-sum-exp did to all of them alike.
        total = tl.sum(tl.where((slot < slots)[:, None], probabilities, 0.0), 0)
        probabilities /= tl.where((prefix_length <= BLOCK_P) & (total > 0.0), total, 1.0)[None, :]
        dprefix_v = dot_add(probabilities.to(do.dtype), do, dprefix_v)
        dscores = score_gradient(probabilities, dot(prefix_v, tl.trans(do)), row_delta[None, :], True)
        dprefix_k = dot_add(dscores.to(q.dtype), q, dprefix_k)

    tile = slot.to(tl.int64)[:, None] * HEAD_DIM + tl.arange(0, BLOCK_D)[None, :]
    size = prefix_length.to(tl.int64) * HEAD_DIM
    base = partial + ((b.to(tl.int64) * heads_q + head) * splits + split) * 2 * size
    stored = slot < prefix_length
    store_tile(base + tile, dprefix_k * (gate_value * scale), stored, HEAD_DIM, BLOCK_D)
    store_tile(base + size + tile, dprefix_v * gate_value, stored, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=("sequences", "per_sequence", "sequence_stride", "stride", "size"))
def reduce_kernel(
    partial, result, prefix_index, sequences, per_sequence, sequence_stride, head_stride, stride, size, heads,
    result_strides, HEAD_DIM: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """result[a, h, :] = sum over the sequences b of entry a and their `per_sequence` partial sums, in a fixed order.

    partial[b * sequence_stride + h * head_stride + r * stride + c], c < size; rows of the result have HEAD_DIM columns.
    SHARED: one entry for every sequence; else `prefix_index` chooses, or without it entry a is for sequence a alone.
    """
    entry = tl.program_id(0) // heads
    head = tl.program_id(0) % heads
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    first = entry * 0
    last = sequences * per_sequence
    if not SHARED and prefix_index is None:
        first = entry * per_sequence
        last = first + per_sequence
    total = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for step in tl.range(0, loop_bound(tl.cdiv(last - first, BLOCK_R))):
        row = first + step * BLOCK_R + tl.arange(0, BLOCK_R)
        b = row // per_sequence
        used = row < last
        if prefix_index is not None:
            used = used & (tl.load(prefix_index + b, mask=used, other=-1) == entry)
        pointers = partial + b.to(tl.int64) * sequence_stride + head.to(tl.int64) * head_stride
        pointers += (row % per_sequence).to(tl.int64) * stride
        valid = used[:, None] & (columns < size)[None, :]
        total += tl.load(pointers[:, None] + columns.to(tl.int64)[None, :], mask=valid, other=0.0)
    # One row of the result per HEAD_DIM columns.
    target = result + entry.to(tl.int64) * result_strides[0] + head.to(tl.int64) * result_strides[1]
    target += (columns // HEAD_DIM).to(tl.int64) * result_strides[2] + columns % HEAD_DIM
    tl.store(target, tl.sum(total, 0).to(result.dtype.element_ty), mask=columns < size)
