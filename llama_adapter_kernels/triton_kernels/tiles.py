# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Kernels are written in Triton's language, which has no Python types: operands are tiles, constexpr is compile time.
"""Tiles in registers: products, loads and stores of [rows, BLOCK_D], offsets that are 64 bits wide.

BLOCK_D is head_dim rounded up to a power of two. ALIGNMENT says by how many elements every stride can be divided (8 are
16 bytes, the widest copy); without it head sizes such as 72 would be loaded element by element.
"""

import triton
import triton.language as tl
from triton import knobs

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# Triton's interpreter multiplies the raw bits of bfloat16 in tl.dot. Widening to float32 there is exact, and leaves
# every rounding that the kernels do themselves in place.
INTERPRETED = tl.constexpr(knobs.runtime.interpret)


@triton.jit
def dot(a, b):
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def dot_add(a, b, acc):
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def loop_bound(count):
    """A bound for tl.range. The interpreter of Triton 3.6 fails to turn its own scalars into one under numpy >= 2.4."""
    if INTERPRETED:
        return count.handle.data.item()
    return count


@triton.jit
def offset(index, stride, ALIGNMENT: tl.constexpr):
    """index * stride in 64 bits, for a scalar or a vector of indices."""
    return tl.multiple_of(index.to(tl.int64) * stride, ALIGNMENT)


@triton.jit
def head_rows(tensor, b, head, row, strides, ALIGNMENT: tl.constexpr):
    """Pointer to row `row` of one head of a [B, H, S, D] tensor with (batch, head, row) strides."""
    return (
        tensor + offset(b, strides[0], ALIGNMENT) + offset(head, strides[1], ALIGNMENT) + offset(row, strides[2], ALIGNMENT)
    )  # fmt: skip


@triton.jit
def tile_offsets(rows, stride, BLOCK_D: tl.constexpr, ALIGNMENT: tl.constexpr):
    """[rows, BLOCK_D] element offsets of a tile of rows."""
    return offset(rows, stride, ALIGNMENT)[:, None] + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def load_tile(pointers, row_valid, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, CHECK_ROWS: tl.constexpr):
    """Loads [rows, BLOCK_D]; what is not valid, and the lanes beyond HEAD_DIM, are zero whatever memory holds."""
    if CHECK_ROWS:
        if HEAD_DIM == BLOCK_D:
            tile = tl.load(pointers, mask=row_valid[:, None], other=0.0)
        else:
            tile = tl.load(pointers, mask=row_valid[:, None] & (tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :], other=0.0)
    else:
        if HEAD_DIM == BLOCK_D:
            tile = tl.load(pointers)
        else:
            tile = tl.load(pointers, mask=(tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :], other=0.0)
    return tile


@triton.jit
def load_rows(
    tensor, b, head, first, rows, row_valid, strides,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """The rows `first + rows` of one head, zero where not valid."""
    pointers = head_rows(tensor, b, head, first, strides, ALIGNMENT) + tile_offsets(
        rows, strides[2], BLOCK_D, ALIGNMENT
    )
    return load_tile(pointers, row_valid, HEAD_DIM, BLOCK_D, True)


@triton.jit
def load_described(descriptor, b, head, row, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """The rows row..row+BLOCK-1 of one head by a tensor descriptor: the card's copy engine computes the addresses."""
    return descriptor.load([b, head, row, 0]).reshape(BLOCK, BLOCK_D)


@triton.jit
def store_tile(pointers, tile, row_valid, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    valid = row_valid[:, None] & (tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :]
    tl.store(pointers, tile.to(pointers.dtype.element_ty), mask=valid)


@triton.jit
def store_rows(
    tensor, b, head, first, rows, tile, row_valid, strides,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ALIGNMENT: tl.constexpr,
):  # fmt: skip
    pointers = head_rows(tensor, b, head, first, strides, ALIGNMENT) + tile_offsets(
        rows, strides[2], BLOCK_D, ALIGNMENT
    )
    store_tile(pointers, tile, row_valid, HEAD_DIM, BLOCK_D)
