# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Backward of the prefix: the gradients of one longer than a tile, and the sums of all partial gradients.

dVp = gate P_p^T dO              dKp = scale gate (P_p * (dO Vp^T - D_p))^T Q
"""

import triton
import triton.language as tl

from llama_adapter_kernels.triton_kernels.prefix import load_slots
from llama_adapter_kernels.triton_kernels.problem import (
    choose_prefix,
    load_gate,
    locate_rows,
    packed_tokens,
    statistic_row,
)
from llama_adapter_kernels.triton_kernels.scores import score_gradient, word_probabilities
from llama_adapter_kernels.triton_kernels.tiles import (
    dot,
    dot_add,
    head_rows,
    load_rows,
    loop_bound,
    store_tile,
    tile_offsets,
)

VARYING = (
    "gate_stride_prefix", "gate_stride_head", "heads_q", "group", "seq_q", "total_q", "sequences", "prefix_count",
    "prefix_length", "chunks",
)  # fmt: skip


@triton.jit(do_not_specialize=VARYING)
def backward_prefix_kernel(
    query, doutput, prefix_key, prefix_value, gate, prefix_index, cu_seqlens_q, prefix_logsumexp, prefix_delta,
    dprefix_partial,
    query_strides, doutput_strides, prefix_key_strides, prefix_value_strides,
    gate_stride_prefix, gate_stride_head, heads_q, group, seq_q, total_q, sequences, prefix_count, prefix_length, chunks,
    scale, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, TOKENS: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """Program (sequence, head, tile of slots, chunk of rows): BLOCK_P slots of dKp and dVp, to `dprefix_partial` as
    backward_rows_kernel writes it for a short prefix."""
    program = tl.program_id(0)
    chunk = program % chunks
    slot_blocks = tl.cdiv(prefix_length, BLOCK_P)
    slot_first = (program // chunks) % slot_blocks * BLOCK_P
    head = (program // (chunks * slot_blocks)) % heads_q
    b = program // (chunks * slot_blocks * heads_q)
    query_first = b * 0
    queries = seq_q + 0
    row_low = b * 0
    if TOKENS:
        row_low, row_high = packed_tokens(cu_seqlens_q, sequences, total_q)
    else:
        query_first, queries = locate_rows(b, cu_seqlens_q, seq_q, total_q)
        row_high = queries
    entry, slots, bad = choose_prefix(b, prefix_index, prefix_count, prefix_length)
    gate_value = load_gate(gate, entry, head, slots, bad, gate_stride_prefix, gate_stride_head)
    head_kv = head // group
    prefix_k = load_slots(prefix_key, entry, head_kv, slot_first, slots, prefix_key_strides,
                          BLOCK_P, HEAD_DIM, BLOCK_D, ALIGNMENT)  # fmt: skip
    prefix_v = load_slots(prefix_value, entry, head_kv, slot_first, slots, prefix_value_strides,
                          BLOCK_P, HEAD_DIM, BLOCK_D, ALIGNMENT)  # fmt: skip
    statistic = statistic_row(b, head, query_first, heads_q, total_q, cu_seqlens_q is not None)

    tiles = tl.cdiv(queries, BLOCK_M)
    tiles_per_chunk = tl.cdiv(tiles, chunks)
    first_tile = chunk * tiles_per_chunk
    last_tile = tl.minimum(first_tile + tiles_per_chunk, tiles)
    dprefix_k = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    dprefix_v = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    for tile in tl.range(loop_bound(first_tile), loop_bound(last_tile)):
        rows = b * 0 + tile * BLOCK_M + tl.arange(0, BLOCK_M)
        row_valid = (rows >= row_low) & (rows < row_high)
        q = load_rows(query, b, head, query_first, rows, row_valid, query_strides, HEAD_DIM, BLOCK_D, ALIGNMENT)
        do = load_rows(doutput, b, head, query_first, rows, row_valid, doutput_strides, HEAD_DIM, BLOCK_D, ALIGNMENT)
        row_logsumexp = tl.load(prefix_logsumexp + statistic + rows, mask=row_valid, other=float("inf"))
        row_delta = tl.load(prefix_delta + statistic + rows, mask=row_valid, other=0.0)
        # Slots beyond P give rows of their own here, which are not stored.
        probabilities = word_probabilities(dot(prefix_k, tl.trans(q)), scale_log2, row_logsumexp[None, :], False)
        dprefix_v = dot_add(probabilities.to(do.dtype), do, dprefix_v)
        dscores = score_gradient(probabilities, dot(prefix_v, tl.trans(do)), row_delta[None, :], True)
        dprefix_k = dot_add(dscores.to(q.dtype), q, dprefix_k)

    slot = slot_first + tl.arange(0, BLOCK_P)
    size = prefix_length.to(tl.int64) * HEAD_DIM
    part = (b.to(tl.int64) * heads_q + head) * chunks + chunk
    pointers = dprefix_partial + part * 2 * size + tile_offsets(slot, HEAD_DIM, BLOCK_D, 1)
    stored = slot < prefix_length
    store_tile(pointers, dprefix_k * (gate_value * scale), stored, HEAD_DIM, BLOCK_D)
    store_tile(pointers + size, dprefix_v * gate_value, stored, HEAD_DIM, BLOCK_D)


@triton.jit
def sum_parts(
    partial, prefix_index, entry, columns, column_valid, sequences, parts, sequence_stride, part_stride,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """[BLOCK_C] sums over the sequences b of an entry and their `parts` parts, in a fixed order.

    partial[b * sequence_stride + part * part_stride + column]. SHARED: one entry for every sequence; else `prefix_index`
    chooses, or without it entry a is for sequence a alone.
    """
    first = entry * 0
    last = sequences * parts
    if not SHARED and prefix_index is None:
        first = entry * parts
        last = first + parts
    total = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for step in tl.range(0, loop_bound(tl.cdiv(last - first, BLOCK_R))):
        row = first + step * BLOCK_R + tl.arange(0, BLOCK_R)
        b = row // parts
        used = row < last
        if prefix_index is not None:
            used = tl.load(prefix_index + b, mask=used, other=-1) == entry
        pointers = partial + b.to(tl.int64) * sequence_stride + (row % parts).to(tl.int64) * part_stride
        valid = used[:, None] & column_valid[None, :]
        total += tl.load(pointers[:, None] + columns.to(tl.int64)[None, :], mask=valid, other=0.0)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=("sequences", "chunks", "heads_q", "group", "prefix_length"))
def backward_sums_kernel(
    dprefix_partial, dgate_partial, prefix_index, dprefix_key, dprefix_value, dgate,
    dprefix_key_strides, dprefix_value_strides, sequences, chunks, heads_q, group, prefix_length,
    HEAD_DIM: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """Program (entry, key/value head, block of columns). The last block of a head sums the gradients of its group's gates;
    each block before it BLOCK_C of the 2 P D elements of dKp and dVp, over all heads of the group."""
    heads_kv = heads_q // group
    entry = tl.program_id(0) // heads_kv
    head_kv = tl.program_id(0) % heads_kv
    head_first = head_kv * group
    if tl.program_id(1) == tl.num_programs(1) - 1:
        column = tl.arange(0, 16)
        for member in tl.range(0, loop_bound(group + 0)):
            head = head_first + member
            gate_sum = sum_parts(
                dgate_partial + head.to(tl.int64) * chunks, prefix_index, entry, column, column < 1, sequences, chunks,
                heads_q * chunks, 1, BLOCK_R, 16, SHARED,
            )  # fmt: skip
            tl.store(dgate + entry.to(tl.int64) * heads_q + head + column, gate_sum, mask=column < 1)
    else:
        size = prefix_length * HEAD_DIM
        columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
        part_stride = 2 * size
        sums = sum_parts(
            dprefix_partial + head_first.to(tl.int64) * chunks * part_stride, prefix_index, entry, columns,
            columns < 2 * size, sequences, group * chunks, heads_q.to(tl.int64) * chunks * part_stride, part_stride,
            BLOCK_R, BLOCK_C, SHARED,
        )  # fmt: skip
        # One row of the result for HEAD_DIM columns.
        is_value = columns >= size
        within = tl.where(is_value, columns - size, columns)
        slot, lane = (within // HEAD_DIM).to(tl.int64), within % HEAD_DIM
        key_row = head_rows(dprefix_key, entry, head_kv, entry * 0, dprefix_key_strides, 1)
        tl.store(key_row + slot * dprefix_key_strides[2] + lane,
                 sums.to(dprefix_key.dtype.element_ty), mask=columns < size)  # fmt: skip
        value_row = head_rows(dprefix_value, entry, head_kv, entry * 0, dprefix_value_strides, 1)
        tl.store(value_row + slot * dprefix_value_strides[2] + lane,
                 sums.to(dprefix_value.dtype.element_ty), mask=is_value & (columns < 2 * size))  # fmt: skip
