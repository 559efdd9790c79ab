# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Scores, probabilities and what becomes of them: masks, the sweep of online softmax over keys, score gradients.

Scores live in units of log2: exp2 is one instruction, and log2(e) is folded into the scale.
"""

import triton
import triton.language as tl

from llama_adapter_kernels.triton_kernels.problem import sequence_windows, token_windows
from llama_adapter_kernels.triton_kernels.tiles import (
    LOG2E,
    dot,
    dot_add,
    load_described,
    load_tile,
    loop_bound,
    offset,
)

MASK_NONE = tl.constexpr(0)
MASK_BOOL = tl.constexpr(1)  # one byte per element, non-zero = attend
MASK_FLOAT = tl.constexpr(2)  # added to the scaled scores

# A row that sees fewer keys takes D_w from them, and may be marked as without a gradient (`mark_delta`). No block of keys
# is smaller, so that a block all of whose keys are seen holds no marked row.
FEW_KEYS = tl.constexpr(16)


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
def masked_probabilities(
    scores, scale_log2, shift, mask_rows, mask_columns, columns_there, row_valid, MASK: tl.constexpr
):  # fmt: skip
    """word_probabilities [rows, columns] of unscaled scores with a mask, whose [rows, 1] pointers are mask_rows."""
    if MASK != MASK_NONE:
        pointers = mask_rows + mask_columns
        scores = apply_mask(scores * scale_log2, pointers, row_valid & columns_there, MASK)
    return word_probabilities(scores, scale_log2, shift, MASK != MASK_NONE)


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


@triton.jit
def row_windows(
    rows, queries, begin, end, cu_seqlens_q, cu_seqlens_k, total_q, total_k, sequences, search_steps,
    CAUSAL: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """(begin, end) of the keys that each row sees: rows of the packed axis (TOKENS), or of a sequence whose valid keys
    are [begin, end)."""
    if TOKENS:
        row_begin, row_end = token_windows(
            rows, cu_seqlens_q, cu_seqlens_k, total_q, total_k, sequences, search_steps, CAUSAL
        )
    else:
        row_begin, row_end = sequence_windows(rows, queries, begin, end, CAUSAL)
    return row_begin, row_end


@triton.jit
def visible_blocks(
    row_begin, row_end, row_valid, row_first, row_last, queries, begin, end, keys,
    BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """What the valid rows of a tile, row_first..row_last, see: (first key, one past the last key, blocks of keys, how many
    of those, the first ones, every row sees whole)."""
    first = begin
    common = begin
    if TOKENS:
        first = tl.min(tl.where(row_valid, row_begin, keys), 0)
        common = tl.max(tl.where(row_valid, row_begin, 0), 0)
        last = tl.max(tl.where(row_valid, row_end, 0), 0)
        whole = tl.min(tl.where(row_valid, row_end, keys), 0)
    else:
        _, last = sequence_windows(row_last, queries, begin, end, CAUSAL)
        _, whole = sequence_windows(row_first, queries, begin, end, CAUSAL)
    blocks = tl.cdiv(tl.maximum(last - first, 0), BLOCK_N)
    return first, last, blocks, tl.where(common == first, tl.maximum(whole - first, 0) // BLOCK_N, 0)


@triton.jit
def visible(columns, row_begin, row_end, TOKENS: tl.constexpr):
    """[rows, columns]; without TOKENS no column lies before the window."""
    seen = columns[None, :] < row_end[:, None]
    if TOKENS:
        seen = seen & (columns[None, :] >= row_begin[:, None])
    return seen


@triton.jit
def attend(
    acc, row_sum, row_max, query, key_tile, value_tile, key_descriptor, value_descriptor, b, head_kv, mask_rows,
    key_stride, value_stride, mask_stride_key, start, blocks, last, row_begin, row_end, row_valid, scale_log2,
    BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, CHECK: tl.constexpr,
    ELEMENTWISE: tl.constexpr, MASK: tl.constexpr, TOKENS: tl.constexpr, ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """Online softmax over `blocks` blocks of keys from `start`: returns (acc, row_sum, row_max).

    key_tile, value_tile: [BLOCK_N, BLOCK_D] pointers to the head's keys 0..BLOCK_N-1. CHECK: row r sees the keys
    row_begin[r]..row_end[r]-1 only, and keys from `last` on are not there; otherwise every row sees every key, and
    descriptors, where there are some, do the loading. The maximum is taken before scaling, which saves one
    multiplication per score. ELEMENTWISE: a scale that is not positive, or a mask.
    """
    for block in tl.range(0, loop_bound(blocks)):
        key_first = start + block * BLOCK_N
        columns = key_first + tl.arange(0, BLOCK_N)
        there = columns < last
        if not CHECK and key_descriptor is not None:
            key = load_described(key_descriptor, b, head_kv, key_first, BLOCK_N, BLOCK_D)
        else:
            key = load_tile(key_tile + offset(key_first, key_stride, ALIGNMENT), there, HEAD_DIM, BLOCK_D, CHECK)
        scores = dot(query, tl.trans(key))
        if ELEMENTWISE:
            scores = scores * scale_log2
            if MASK != MASK_NONE:
                pointers = mask_rows[:, None] + offset(columns, mask_stride_key, 1)[None, :]
                scores = apply_mask(scores, pointers, row_valid[:, None] & there[None, :], MASK)
        if CHECK:
            scores = tl.where(visible(columns, row_begin, row_end, TOKENS), scores, float("-inf"))
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
        if not CHECK and value_descriptor is not None:
            value = load_described(value_descriptor, b, head_kv, key_first, BLOCK_N, BLOCK_D)
        else:
            value = load_tile(value_tile + offset(key_first, value_stride, ALIGNMENT), there, HEAD_DIM, BLOCK_D, CHECK)
        acc = dot_add(probabilities.to(value.dtype), value, acc)
    return acc, row_sum, row_max


@triton.jit
def normalise(acc, row_sum, row_max):
    """(acc / row_sum, base-2 log-sum-exp); a row that saw no key has 0 and -inf. NaN stays NaN."""
    empty = row_sum == 0.0
    acc = acc * tl.where(empty, 0.0, 1.0 / tl.where(empty, 1.0, row_sum))[:, None]
    return acc, tl.where(empty, float("-inf"), row_max + tl.log2(tl.where(empty, 1.0, row_sum)))


@triton.jit
def load_statistics(pointers, row_valid, CHECK: tl.constexpr):
    """(log-sum-exp in base 2, D_w) of rows, as backward_rows_kernel leaves them beside each other; CHECK: only valid rows,
    else all. The log-sum-exp is 0 where a row saw no key: what it sees has no probability anyway."""
    if CHECK:
        row_logsumexp = tl.load(pointers, mask=row_valid, other=0.0)
        row_delta = tl.load(pointers + 1, mask=row_valid, other=0.0)
    else:
        row_logsumexp = tl.load(pointers)
        row_delta = tl.load(pointers + 1)
    return row_logsumexp, row_delta
