# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Zeroes the rows of a packed tensor that come after the last sequence and belong to none."""

import triton
import triton.language as tl

from llama_adapter_kernels.triton_kernels.tiles import head_rows, loop_bound, store_tile, tile_offsets


@triton.jit(do_not_specialize=("total", "sequences", "heads"))
def zero_tail_kernel(tensor, cu_seqlens, strides, total, sequences, heads,
                     HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """Program (ROWS rows): nothing but a comparison for rows of sequences."""
    row_first = tl.program_id(0) * ROWS
    first = tl.minimum(tl.maximum(tl.load(cu_seqlens + sequences), 0), total)
    if row_first + ROWS <= first:
        return
    rows = row_first + tl.arange(0, ROWS)
    tail = (rows >= first) & (rows < total)
    for head in tl.range(0, loop_bound(heads)):
        pointers = head_rows(tensor, row_first * 0, row_first * 0 + head, row_first * 0, strides, 1)
        pointers += tile_offsets(rows, strides[2], BLOCK_D, 1)
        store_tile(pointers, tl.zeros([ROWS, BLOCK_D], tl.float32), tail, HEAD_DIM, BLOCK_D)
