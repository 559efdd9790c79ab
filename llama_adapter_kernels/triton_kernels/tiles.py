# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Kernels are written in Triton's language, which has no Python types: operands are tiles, constexpr is compile time.
"""What the kernels share: where a sequence lies, loading tiles, one sweep of online softmax over keys, the prefix.

Scores live in units of log2: exp2 is one instruction, and log2(e) is folded into the scale. Offsets are 64 bits wide,
so that no tensor is too large. ALIGNMENT says by how many elements every stride can be divided (8 are 16 bytes, the
widest copy); without it head sizes such as 72 would be loaded element by element.
"""

import triton
import triton.language as tl
from triton import knobs

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

MASK_NONE = tl.constexpr(0)
MASK_BOOL = tl.constexpr(1)  # one byte per element, non-zero = attend
MASK_FLOAT = tl.constexpr(2)  # added to the scaled scores

PREFIX_NONE = tl.constexpr(0)
PREFIX_ONE_TILE = tl.constexpr(1)  # P <= BLOCK_P
PREFIX_LOOP = tl.constexpr(2)

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
def tile_offsets(rows, stride, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ALIGNMENT: tl.constexpr):
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
def store_tile(pointers, tile, row_valid, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    valid = row_valid[:, None] & (tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :]
    tl.store(pointers, tile.to(pointers.dtype.element_ty), mask=valid)


@triton.jit
def packed_rows(b, cu_seqlens, total, longest):
    """(first row, rows) of sequence b, within memory and grid whatever cu_seqlens holds."""
    first = tl.minimum(tl.maximum(tl.load(cu_seqlens + b), 0), total)
    last = tl.minimum(tl.maximum(tl.load(cu_seqlens + b + 1), first), total)
    return first, tl.minimum(last - first, longest)


@triton.jit
def valid_keys(b, key_start, key_end, keys):
    """The window [begin, end) of sequence b, within its keys whatever the lengths hold."""
    begin = b * 0
    end = keys
    if key_end is not None:
        end = tl.minimum(tl.maximum(tl.load(key_end + b), 0), keys)
    if key_start is not None:
        begin = tl.minimum(tl.maximum(tl.load(key_start + b), 0), end)
    return begin, end


@triton.jit
def locate_queries(b, cu_seqlens_q, seq_q, total_q):
    """(first row, rows) of sequence b."""
    first = b * 0
    queries = seq_q + 0
    if cu_seqlens_q is not None:
        first, queries = packed_rows(b, cu_seqlens_q, total_q, seq_q)
    return first, queries


@triton.jit
def locate_keys(b, cu_seqlens_k, seq_k, total_k):
    """(first key row, keys in memory) of sequence b."""
    first = b * 0
    keys = seq_k + 0
    if cu_seqlens_k is not None:
        first, keys = packed_rows(b, cu_seqlens_k, total_k, seq_k)
    return first, keys


@triton.jit
def locate(b, key_start, key_end, cu_seqlens_q, cu_seqlens_k, seq_q, seq_k, total_q, total_k):
    """(first query row, queries, first key row, keys in memory, begin and end of the valid keys) of sequence b."""
    query_first, queries = locate_queries(b, cu_seqlens_q, seq_q, total_q)
    key_first, keys = locate_keys(b, cu_seqlens_k, seq_k, total_k)
    begin, end = valid_keys(b, key_start, key_end, keys)
    return query_first, queries, key_first, keys, begin, end


@triton.jit
def choose_prefix(b, prefix_index, prefix_count, prefix_length):
    """(entry of the table, usable slots, whether the index was out of range) of sequence b.

    Without a prefix (index -1) there are no slots and nothing of the entry is read.
    """
    entry = tl.where(prefix_count > 1, b, 0)
    if prefix_index is not None:
        entry = tl.load(prefix_index + b)
    slots = tl.where(entry == -1, 0, prefix_length)
    bad = (entry < -1) | (entry >= prefix_count)
    return tl.minimum(tl.maximum(entry, 0), prefix_count - 1), slots, bad


@triton.jit
def load_gate(gate, entry, head, slots, bad, gate_stride_prefix, gate_stride_head):
    """The gate in float32; NaN for an index out of range, so that it shows; 0 without a prefix."""
    pointer = gate + entry.to(tl.int64) * gate_stride_prefix + head.to(tl.int64) * gate_stride_head
    value = tl.load(pointer, mask=slots > 0, other=0.0).to(tl.float32)
    return tl.where(bad, float("nan"), value)


@triton.jit
def apply_mask(scores, pointers, valid, MASK: tl.constexpr):
    """Masks scores (in units of log2)."""
    entries = tl.load(pointers, mask=valid, other=0)
    if MASK == MASK_BOOL:
        masked = tl.where(entries != 0, scores, float("-inf"))
    else:
        masked = scores + entries.to(tl.float32) * LOG2E
    return masked


@triton.jit
def attend(
    acc, row_sum, row_max, query, key_tile, value_tile, mask_rows, key_stride, value_stride, mask_stride_key,
    begin, blocks, last, row_limit, row_valid, scale_log2,
    BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, CHECK: tl.constexpr,
    ELEMENTWISE: tl.constexpr, MASK: tl.constexpr, ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """Online softmax over `blocks` blocks of keys from `begin`: returns (acc, row_sum, row_max).

    key_tile, value_tile: [BLOCK_N, BLOCK_D] pointers to the sequence's keys 0..BLOCK_N-1. CHECK: row r sees keys below
    row_limit[r] only, and keys from `last` on are not there; otherwise every row sees every key. The maximum is taken
    before scaling, which saves one multiplication per score. ELEMENTWISE: a scale that is not positive, or a mask.
    """
    for block in tl.range(0, loop_bound(blocks)):
        start = begin + block * BLOCK_N
        columns = start + tl.arange(0, BLOCK_N)
        there = columns < last
        key = load_tile(key_tile + offset(start, key_stride, ALIGNMENT), there, HEAD_DIM, BLOCK_D, CHECK)
        scores = dot(query, tl.trans(key))
        if ELEMENTWISE:
            scores = scores * scale_log2
            if MASK != MASK_NONE:
                pointers = mask_rows[:, None] + offset(columns, mask_stride_key, 1)[None, :]
                scores = apply_mask(scores, pointers, row_valid[:, None] & there[None, :], MASK)
        if CHECK:
            scores = tl.where(columns[None, :] < row_limit[:, None], scores, float("-inf"))
        largest = tl.max(scores, 1)
        if not ELEMENTWISE:
            largest = largest * scale_log2
        new_max = tl.maximum(row_max, largest)
        shift = new_max
        if CHECK:  # a row that has seen no key yet: any finite shift gives exp2(-inf) = 0 instead of NaN
            shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        probabilities = word_probabilities(scores, scale_log2, shift[:, None], ELEMENTWISE)
        rescale = tl.exp2(row_max - shift)
        row_sum = row_sum * rescale + tl.sum(probabilities, 1)
        row_max = new_max
        acc = acc * rescale[:, None]
        value = load_tile(value_tile + offset(start, value_stride, ALIGNMENT), there, HEAD_DIM, BLOCK_D, CHECK)
        acc = dot_add(probabilities.to(value.dtype), value, acc)
    return acc, row_sum, row_max


@triton.jit
def normalise(acc, row_sum, row_max):
    """(acc / row_sum, base-2 log-sum-exp); a row that saw no key has 0 and -inf. NaN stays NaN."""
    empty = row_sum == 0.0
    acc = acc * tl.where(empty, 0.0, 1.0 / tl.where(empty, 1.0, row_sum))[:, None]
    return acc, tl.where(empty, float("-inf"), row_max + tl.log2(tl.where(empty, 1.0, row_sum)))


@triton.jit
def word_probabilities(scores, scale_log2, shift, ELEMENTWISE: tl.constexpr):
    """exp(scale * scores - LSE), shift = LSE in base 2; ELEMENTWISE: the scores are scaled already.

    A multiply-add: rounding the scaled score before the shift is taken off would cost a large one its last digits.
    """
    if ELEMENTWISE:
        probabilities = tl.exp2(scores - shift)
    else:
        probabilities = tl.exp2(tl.fma(scores, scale_log2, -shift))
    return probabilities


@triton.jit
def prefix_scores(query, prefix_key, slot, slots, scale_log2):
    scores = dot(query, tl.trans(prefix_key)) * scale_log2
    return tl.where((slot < slots)[None, :], scores, float("-inf"))


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
    acc, query, key_tile, value_tile, key_stride, value_stride, slots, gate, scale_log2,
    BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """As add_prefix_tile for a longer prefix: one pass for the softmax statistics, one that adds."""
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    tiles = tl.cdiv(slots, BLOCK_P)
    zero = slots * 0
    for tile in tl.range(0, loop_bound(tiles)):
        first = zero + tile * BLOCK_P
        slot = first + tl.arange(0, BLOCK_P)
        prefix_key = load_tile(key_tile + offset(first, key_stride, ALIGNMENT), slot < slots, HEAD_DIM, BLOCK_D, True)
        scores = prefix_scores(query, prefix_key, slot, slots, scale_log2)
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        total = total * tl.exp2(largest - new_largest) + tl.sum(tl.exp2(scores - new_largest[:, None]), 1)
        largest = new_largest
    factor = tl.where(total == 0.0, gate * 0.0, gate / tl.where(total == 0.0, 1.0, total))
    for tile in tl.range(0, loop_bound(tiles)):
        first = zero + tile * BLOCK_P
        slot = first + tl.arange(0, BLOCK_P)
        prefix_key = load_tile(key_tile + offset(first, key_stride, ALIGNMENT), slot < slots, HEAD_DIM, BLOCK_D, True)
        prefix_value = load_tile(
            value_tile + offset(first, value_stride, ALIGNMENT), slot < slots, HEAD_DIM, BLOCK_D, True
        )
        scores = prefix_scores(query, prefix_key, slot, slots, scale_log2)
        weights = tl.exp2(scores - largest[:, None]) * factor[:, None]
        acc = dot_add(weights.to(prefix_value.dtype), prefix_value, acc)
    return acc


@triton.jit
def score_gradient(probabilities, dprobabilities, delta, MARKED: tl.constexpr):
    """dS = P * (dP - D). MARKED: delta may be +inf, the mark of a row whose probabilities are 0 and 1: exactly zero."""
    dscores = probabilities * (dprobabilities - delta)
    if MARKED:
        dscores = tl.where(delta == float("inf"), 0.0, dscores)
    return dscores


@triton.jit
def mark_delta(delta, without_gradient):
    """delta as `score_gradient` takes it. A sum that is not finite is NaN and no mark: it must show."""
    finite = tl.abs(delta) < float("inf")
    return tl.where(finite, tl.where(without_gradient, float("inf"), delta), float("nan"))
