# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The prefix: P slots that every query sees, a softmax of its own, the gate.

Up to BLOCK_P slots are one tile, whose softmax is complete at once. A longer prefix is swept tile by tile.
"""

import triton
import triton.language as tl

from llama_adapter_kernels.triton_kernels.tiles import (
    dot,
    dot_add,
    head_rows,
    load_rows,
    load_tile,
    loop_bound,
    offset,
    tile_offsets,
)

PREFIX_NONE = tl.constexpr(0)
PREFIX_ONE_TILE = tl.constexpr(1)  # P <= BLOCK_P
PREFIX_LOOP = tl.constexpr(2)


@triton.jit
def load_slots(
    prefix, entry, head_kv, first, slots, strides,
    BLOCK_P: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """The slots first..first+BLOCK_P-1 of one entry and head, zero from `slots` on."""
    slot = first + tl.arange(0, BLOCK_P)
    return load_rows(
        prefix, entry, head_kv, first * 0, slot, slot < slots, strides, HEAD_DIM, BLOCK_D, ALIGNMENT
    )  # fmt: skip


@triton.jit
def prefix_scores(query, prefix_key, slot, slots, scale_log2):
    """[rows, BLOCK_P] scores in base 2, -inf beyond the slots."""
    scores = dot(query, tl.trans(prefix_key)) * scale_log2
    return tl.where((slot < slots)[None, :], scores, float("-inf"))


@triton.jit
def prefix_softmax(scores, AXIS: tl.constexpr):
    """Probabilities of one complete tile of scores along the axis of the slots; all 0 where there is no slot."""
    largest = tl.max(scores, AXIS, keep_dims=True)
    weights = tl.exp2(scores - tl.where(largest == float("-inf"), 0.0, largest))
    total = tl.sum(weights, AXIS, keep_dims=True)
    return weights / tl.where(total == 0.0, 1.0, total)


@triton.jit
def add_prefix_tile(acc, query, prefix_key, prefix_value, slots, gate, scale_log2, BLOCK_P: tl.constexpr):
    """acc + gate * softmax(scale Q Kp^T) Vp for a prefix that is one tile; acc is normalised already.

    The weights carry gate / sum, so the matrix unit adds into the accumulator that holds the words. Normalising before
    (not after, as one may) costs the same, needs no row sum of the words, and keeps the weights within float16.
    """
    scores = prefix_scores(query, prefix_key, tl.arange(0, BLOCK_P), slots, scale_log2)
    largest = tl.max(scores, 1)
    weights = tl.exp2(scores - tl.where(largest == float("-inf"), 0.0, largest)[:, None])
    total = tl.sum(weights, 1)
    factor = tl.where(total == 0.0, gate * 0.0, gate / tl.where(total == 0.0, 1.0, total))
    return dot_add((weights * factor[:, None]).to(prefix_value.dtype), prefix_value, acc)


@triton.jit
def add_prefix_loop(
    acc, query, prefix_key, prefix_value, key_strides, value_strides, entry, head_kv, slots, gate, scale_log2,
    BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """As add_prefix_tile for a longer prefix: one pass for the softmax statistics, one that adds."""
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    tiles = tl.cdiv(slots, BLOCK_P)
    column = tl.arange(0, BLOCK_P)
    key_tile = head_rows(prefix_key, entry, head_kv, slots * 0, key_strides, ALIGNMENT)
    key_tile += tile_offsets(column, key_strides[2], BLOCK_D, ALIGNMENT)
    value_tile = head_rows(prefix_value, entry, head_kv, slots * 0, value_strides, ALIGNMENT)
    value_tile += tile_offsets(column, value_strides[2], BLOCK_D, ALIGNMENT)
    for tile in tl.range(0, loop_bound(tiles)):
        first = slots * 0 + tile * BLOCK_P
        slot = first + column
        key = load_tile(key_tile + offset(first, key_strides[2], ALIGNMENT), slot < slots, HEAD_DIM, BLOCK_D, True)
        scores = prefix_scores(query, key, slot, slots, scale_log2)
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        total = total * tl.exp2(largest - new_largest) + tl.sum(tl.exp2(scores - new_largest[:, None]), 1)
        largest = new_largest
    factor = tl.where(total == 0.0, gate * 0.0, gate / tl.where(total == 0.0, 1.0, total))
    for tile in tl.range(0, loop_bound(tiles)):
        first = slots * 0 + tile * BLOCK_P
        slot = first + column
        key = load_tile(key_tile + offset(first, key_strides[2], ALIGNMENT), slot < slots, HEAD_DIM, BLOCK_D, True)
        value = load_tile(
            value_tile + offset(first, value_strides[2], ALIGNMENT), slot < slots, HEAD_DIM, BLOCK_D, True
        )
        scores = prefix_scores(query, key, slot, slots, scale_log2)
        weights = tl.exp2(scores - largest[:, None]) * factor[:, None]
        acc = dot_add(weights.to(value.dtype), value, acc)
    return acc


@triton.jit
def prefix_scores_by_slot(prefix_key, query, slot, slots, scale_log2):
    """As prefix_scores, transposed: [BLOCK_P, rows]. Probabilities then are an operand of sums over rows as they are."""
    scores = dot(prefix_key, tl.trans(query)) * scale_log2
    return tl.where((slot < slots)[:, None], scores, float("-inf"))
