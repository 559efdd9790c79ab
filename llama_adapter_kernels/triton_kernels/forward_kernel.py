# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Forward: one program computes BLOCK_M query rows of one head.

    O = softmax(scale Q K^T) V + gate * softmax(scale Q Kp^T) Vp

Keys are swept once with online softmax: first the blocks that every row sees whole, without any test, then the few on
the causal diagonal, at the edges of sequences and at the end. The prefix, one small tile, is added into the same
accumulator at the end; its loads are issued at the start, so that they are there when they are needed.
"""

import triton
import triton.language as tl

from llama_adapter_kernels.triton_kernels.prefix import (
    PREFIX_LOOP,
    PREFIX_NONE,
    PREFIX_ONE_TILE,
    add_prefix_loop,
    add_prefix_tile,
    load_slots,
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
    MASK_NONE,
    attend,
    normalise,
    row_windows,
    visible_blocks,
)
from llama_adapter_kernels.triton_kernels.tiles import LN2, head_rows, load_rows, offset, store_rows, tile_offsets

# Values that change from call to call must not lead to a compilation of their own.
VARYING = (
    "gate_stride_prefix", "gate_stride_head", "mask_stride_batch", "mask_stride_head", "mask_stride_query",
    "mask_stride_key", "heads_q", "group", "seq_q", "seq_k", "total_q", "total_k", "sequences", "search_steps",
    "prefix_count", "prefix_length",
)  # fmt: skip


@triton.jit(do_not_specialize=VARYING)
def forward_kernel(
    query, key, value, prefix_key, prefix_value, gate, output, logsumexp,
    mask, key_start, key_end, prefix_index, cu_seqlens_q, cu_seqlens_k, key_descriptor, value_descriptor,
    query_strides, key_strides, value_strides, prefix_key_strides, prefix_value_strides, output_strides,
    gate_stride_prefix, gate_stride_head, mask_stride_batch, mask_stride_head, mask_stride_query, mask_stride_key,
    heads_q, group, seq_q, seq_k, total_q, total_k, sequences, search_steps, prefix_count, prefix_length, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr, PREFIX: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr, ELEMENTWISE: tl.constexpr,
    TOKENS: tl.constexpr, ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """ELEMENTWISE: no block may skip the tests (a mask, or a scale that is not positive), see `attend`."""
    program = tl.program_id(0)
    row_blocks = tl.cdiv(seq_q, BLOCK_M)
    # Causal: the last rows see most keys, so they start first and the short ones fill the gaps at the end.
    row_first = (row_blocks - 1 - program % row_blocks) * BLOCK_M
    head = (program // row_blocks) % heads_q
    b = program // (row_blocks * heads_q)
    query_first = b * 0
    queries = seq_q + 0
    key_first = b * 0
    keys = seq_k + 0
    rows = row_first + tl.arange(0, BLOCK_M)
    if TOKENS:
        tokens_first, tokens_last = packed_tokens(cu_seqlens_q, sequences, total_q)
        row_valid = (rows >= tokens_first) & (rows < tokens_last)
    else:
        query_first, queries = locate_rows(b, cu_seqlens_q, seq_q, total_q)
        key_first, keys = locate_rows(b, cu_seqlens_k, seq_k, total_k)
        if row_first >= queries:
            return
        row_valid = rows < queries
    begin, end = valid_keys(b, key_start, key_end, keys)
    head_kv = head // group
    q = load_rows(query, b, head, query_first, rows, row_valid, query_strides, HEAD_DIM, BLOCK_D, ALIGNMENT)

    if PREFIX != PREFIX_NONE:
        entry, slots, bad = choose_prefix(b, prefix_index, prefix_count, prefix_length)
        gate_value = load_gate(gate, entry, head, slots, bad, gate_stride_prefix, gate_stride_head)
        if PREFIX == PREFIX_ONE_TILE:
            prefix_k = load_slots(prefix_key, entry, head_kv, slots * 0, slots, prefix_key_strides,
                                  BLOCK_P, HEAD_DIM, BLOCK_D, ALIGNMENT)  # fmt: skip
            prefix_v = load_slots(prefix_value, entry, head_kv, slots * 0, slots, prefix_value_strides,
                                  BLOCK_P, HEAD_DIM, BLOCK_D, ALIGNMENT)  # fmt: skip

    column = tl.arange(0, BLOCK_N)
    key_tile = head_rows(key, b, head_kv, key_first, key_strides, ALIGNMENT)
    key_tile += tile_offsets(column, key_strides[2], BLOCK_D, ALIGNMENT)
    value_tile = head_rows(value, b, head_kv, key_first, value_strides, ALIGNMENT)
    value_tile += tile_offsets(column, value_strides[2], BLOCK_D, ALIGNMENT)
    mask_rows = rows
    if MASK != MASK_NONE:
        mask_base = mask + offset(b, mask_stride_batch, 1) + offset(head, mask_stride_head, 1)
        mask_rows = mask_base + offset(rows, mask_stride_query, 1)

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_begin, row_end = row_windows(
        rows, queries, begin, end, cu_seqlens_q, cu_seqlens_k, total_q, total_k, sequences, search_steps, CAUSAL, TOKENS
    )
    row_last = row_first + BLOCK_M - 1  # or past the last query, where none sees more keys
    first, last, blocks, whole = visible_blocks(
        row_begin, row_end, row_valid, row_first, row_last, queries, begin, end, keys, BLOCK_N, CAUSAL, TOKENS
    )
    if ELEMENTWISE:
        whole = blocks * 0
    else:
        acc, row_sum, row_max = attend(
            acc, row_sum, row_max, q, key_tile, value_tile, key_descriptor, value_descriptor, b, head_kv, mask_rows,
            key_strides[2], value_strides[2], mask_stride_key, first, whole, last, row_begin, row_end, row_valid,
            scale_log2, BLOCK_N, HEAD_DIM, BLOCK_D, False, False, MASK_NONE, TOKENS, ALIGNMENT,
        )  # fmt: skip
    acc, row_sum, row_max = attend(
        acc, row_sum, row_max, q, key_tile, value_tile, None, None, b, head_kv, mask_rows,
        key_strides[2], value_strides[2], mask_stride_key, first + whole * BLOCK_N, blocks - whole, last, row_begin,
        row_end, row_valid, scale_log2, BLOCK_N, HEAD_DIM, BLOCK_D, True, ELEMENTWISE, MASK, TOKENS, ALIGNMENT,
    )  # fmt: skip

    acc, row_logsumexp = normalise(acc, row_sum, row_max)
    if PREFIX == PREFIX_ONE_TILE:
        acc = add_prefix_tile(acc, q, prefix_k, prefix_v, slots, gate_value, scale_log2, BLOCK_P)
    if PREFIX == PREFIX_LOOP:
        acc = add_prefix_loop(
            acc, q, prefix_key, prefix_value, prefix_key_strides, prefix_value_strides, entry, head_kv, slots,
            gate_value, scale_log2, BLOCK_M, BLOCK_P, HEAD_DIM, BLOCK_D, ALIGNMENT,
        )  # fmt: skip
    row_exists = row_valid
    if TOKENS:  # tokens of no sequence: zeros
        row_exists = rows < total_q
        acc = tl.where(row_valid[:, None], acc, 0.0)
    store_rows(output, b, head, query_first, rows, acc, row_exists, output_strides, HEAD_DIM, BLOCK_D, ALIGNMENT)
    statistic = statistic_row(b, head, query_first, heads_q, total_q, cu_seqlens_q is not None)
    tl.store(logsumexp + statistic + rows, row_logsumexp * LN2, mask=row_exists)
