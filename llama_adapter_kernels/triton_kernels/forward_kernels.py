# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Forward: one program computes BLOCK_M query rows of one head.

    O = softmax(scale Q K^T) V + gate * softmax(scale Q Kp^T) Vp

Keys are swept once with online softmax: first the blocks that every row sees whole, without any test, then the few on
the causal diagonal and at the end. The prefix, one small tile, is added into the same accumulator at the end; its loads
are issued at the start, so that they are there when they are needed.
"""

import triton
import triton.language as tl

from llama_adapter_kernels.triton_kernels.tiles import (
    LN2,
    MASK_NONE,
    PREFIX_LOOP,
    PREFIX_NONE,
    PREFIX_ONE_TILE,
    add_prefix_loop,
    add_prefix_tile,
    attend,
    choose_prefix,
    load_gate,
    load_tile,
    locate,
    loop_bound,
    normalise,
    offset,
    store_tile,
    tile_offsets,
)

# Values that change from call to call must not lead to a compilation of their own.
VARYING = (
    "gate_stride_prefix", "gate_stride_head", "mask_stride_batch", "mask_stride_head", "mask_stride_query",
    "mask_stride_key", "heads_q", "group", "seq_q", "seq_k", "total_q", "total_k", "prefix_count", "prefix_length",
)  # fmt: skip


@triton.jit
def visible_blocks(row_first, row_last, queries, begin, end, CAUSAL: tl.constexpr, ELEMENTWISE: tl.constexpr,
                   BLOCK_N: tl.constexpr):  # fmt: skip
    """(blocks that rows row_first..row_last-1 all see whole, all blocks that any of them sees, end of the last)."""
    last = end
    whole = end
    if CAUSAL:
        diagonal = end - queries  # row i sees keys up to i + diagonal
        last = tl.minimum(end, row_last + diagonal)
        whole = tl.minimum(end, row_first + 1 + diagonal)
    blocks = tl.cdiv(tl.maximum(last - begin, 0), BLOCK_N)
    whole_blocks = tl.maximum(whole - begin, 0) // BLOCK_N
    if ELEMENTWISE:
        whole_blocks = blocks * 0
    return whole_blocks, blocks, last


@triton.jit(do_not_specialize=VARYING)
def forward_kernel(
    query, key, value, prefix_key, prefix_value, gate, output, logsumexp,
    mask, key_start, key_end, prefix_index, cu_seqlens_q, cu_seqlens_k,
    query_strides, key_strides, value_strides, prefix_key_strides, prefix_value_strides, output_strides,
    gate_stride_prefix, gate_stride_head, mask_stride_batch, mask_stride_head, mask_stride_query, mask_stride_key,
    heads_q, group, seq_q, seq_k, total_q, total_k, prefix_count, prefix_length, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr, PREFIX: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr, ELEMENTWISE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """ELEMENTWISE: no block may skip the tests (a mask, or a scale that is not positive), see `attend`."""
    program = tl.program_id(0)
    row_blocks = tl.cdiv(seq_q, BLOCK_M)
    # Causal: the last rows see most keys, so they start first and the short ones fill the gaps at the end.
    row_first = (row_blocks - 1 - program % row_blocks) * BLOCK_M
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
    query_tile = query_base + tile_offsets(query_first + rows, query_strides[2], HEAD_DIM, BLOCK_D, ALIGNMENT)
    q = load_tile(query_tile, row_valid, HEAD_DIM, BLOCK_D, True)

    if PREFIX != PREFIX_NONE:
        entry, slots, bad = choose_prefix(b, prefix_index, prefix_count, prefix_length)
        gate_value = load_gate(gate, entry, head, slots, bad, gate_stride_prefix, gate_stride_head)
        slot = tl.arange(0, BLOCK_P)
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
        if PREFIX == PREFIX_ONE_TILE:
            prefix_k = load_tile(prefix_key_tile, slot < slots, HEAD_DIM, BLOCK_D, True)
            prefix_v = load_tile(prefix_value_tile, slot < slots, HEAD_DIM, BLOCK_D, True)

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

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_limit = tl.zeros([BLOCK_M], tl.int32) + end
    if CAUSAL:
        row_limit = tl.minimum(end, rows + (end - queries) + 1)
    row_last = tl.minimum(row_first + BLOCK_M, queries)
    whole, blocks, last = visible_blocks(row_first, row_last, queries, begin, end, CAUSAL, ELEMENTWISE, BLOCK_N)
    if not ELEMENTWISE:
        acc, row_sum, row_max = attend(
            acc, row_sum, row_max, q, key_tile, value_tile, mask_rows, key_strides[2], value_strides[2],
            mask_stride_key, begin, whole, last, row_limit, row_valid, scale_log2,
            BLOCK_N, HEAD_DIM, BLOCK_D, False, False, MASK_NONE, ALIGNMENT,
        )  # fmt: skip
    acc, row_sum, row_max = attend(
        acc, row_sum, row_max, q, key_tile, value_tile, mask_rows, key_strides[2], value_strides[2],
        mask_stride_key, begin + whole * BLOCK_N, blocks - whole, last, row_limit, row_valid, scale_log2,
        BLOCK_N, HEAD_DIM, BLOCK_D, True, ELEMENTWISE, MASK, ALIGNMENT,
    )  # fmt: skip

    acc, row_logsumexp = normalise(acc, row_sum, row_max)
    if PREFIX == PREFIX_ONE_TILE:
        acc = add_prefix_tile(acc, q, prefix_k, prefix_v, slots, gate_value, scale_log2, BLOCK_P)
    if PREFIX == PREFIX_LOOP:
        acc = add_prefix_loop(
            acc, q, prefix_key_tile, prefix_value_tile, prefix_key_strides[2], prefix_value_strides[2], slots,
            gate_value, scale_log2, BLOCK_M, BLOCK_P, HEAD_DIM, BLOCK_D, ALIGNMENT,
        )  # fmt: skip
    output_base = output + offset(b, output_strides[0], ALIGNMENT) + offset(head, output_strides[1], ALIGNMENT)
    output_tile = output_base + tile_offsets(query_first + rows, output_strides[2], HEAD_DIM, BLOCK_D, ALIGNMENT)
    store_tile(output_tile, acc, row_valid, HEAD_DIM, BLOCK_D)
    row_base = logsumexp + head.to(tl.int64) * total_q + query_first
    if cu_seqlens_q is None:
        row_base += b.to(tl.int64) * heads_q * total_q
    tl.store(row_base + rows, row_logsumexp * LN2, mask=row_valid)


@triton.jit(do_not_specialize=("total", "sequences", "heads"))
def clear_tail_kernel(tensor, cu_seqlens, stride_head, stride_row, total, sequences, heads,
                      HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """Zeroes the rows of a packed tensor that come after the last sequence and belong to none."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first = tl.minimum(tl.maximum(tl.load(cu_seqlens + sequences), 0), total)
    if (tl.program_id(0) + 1) * ROWS <= first:
        return
    tail = (rows >= first) & (rows < total)
    for head in tl.range(0, loop_bound(heads)):
        pointers = tensor + rows.to(tl.int64)[:, None] * stride_row + tl.arange(0, BLOCK_D)[None, :]
        pointers += (first * 0 + head).to(tl.int64) * stride_head
        store_tile(pointers, tl.zeros([ROWS, BLOCK_D], tl.float32), tail, HEAD_DIM, BLOCK_D)
