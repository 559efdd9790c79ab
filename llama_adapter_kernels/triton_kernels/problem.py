# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Where sequences lie, which keys a query sees, and which prefix a sequence uses.

Every query sees one window of keys [begin, end), whatever causality, lengths and packing say: kernels know windows only.
Packed sequences come in two ways. Where each one may have a prefix of its own, a program works for one sequence. Where
all share one prefix (or there is none), TOKENS: the packed axis counts as one long sequence, every tile of it is full, and
each row brings its window. Values read from memory are clamped, so that no lie of theirs leads out of a tensor.
"""

import triton
import triton.language as tl

from llama_adapter_kernels.triton_kernels.tiles import loop_bound


@triton.jit
def packed_rows(b, cu_seqlens, total, longest):
    """(first row, rows) of sequence b, within memory and grid whatever cu_seqlens holds."""
    first = tl.minimum(tl.maximum(tl.load(cu_seqlens + b), 0), total)
    last = tl.minimum(tl.maximum(tl.load(cu_seqlens + b + 1), first), total)
    return first, tl.minimum(last - first, longest)


@triton.jit
def locate_rows(b, cu_seqlens, rows, total):
    """(first row, rows) of sequence b; `rows` without cu_seqlens, at most `rows` with it."""
    first = b * 0
    count = rows + 0
    if cu_seqlens is not None:
        first, count = packed_rows(b, cu_seqlens, total, rows)
    return first, count


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
def sequence_windows(rows, queries, begin, end, CAUSAL: tl.constexpr):
    """(begin, end) of each row of one sequence; the last query sees the last valid key."""
    row_begin = rows * 0 + begin
    row_end = rows * 0 + end
    if CAUSAL:
        row_end = tl.minimum(end, rows + (end - queries) + 1)
    return row_begin, row_end


@triton.jit
def sequence_of(positions, cu_seqlens, sequences, search_steps):
    """The last sequence that begins at or before each position (a scalar or a vector), by bisection.

    search_steps: the bits of sequences - 1, so that one sequence is left.
    """
    low = positions * 0
    high = low + sequences
    for _ in tl.range(0, loop_bound(search_steps)):
        middle = (low + high) // 2
        at_or_before = tl.load(cu_seqlens + middle) <= positions
        low = tl.where(at_or_before, middle, low)
        high = tl.where(at_or_before, high, middle)
    return low


@triton.jit
def packed_tokens(cu_seqlens, sequences, total):
    """[first, last) of the tokens that belong to some sequence."""
    first = tl.minimum(tl.maximum(tl.load(cu_seqlens), 0), total)
    return first, tl.minimum(tl.maximum(tl.load(cu_seqlens + sequences), first), total)


@triton.jit
def token_windows(rows, cu_seqlens_q, cu_seqlens_k, total_q, total_k, sequences, search_steps, CAUSAL: tl.constexpr):
    """(begin, end) of each row of the packed axis, in rows of the packed keys; begin = end where a row sees none."""
    b = sequence_of(rows, cu_seqlens_q, sequences, search_steps)
    query_first, queries = packed_rows(b, cu_seqlens_q, total_q, total_q)
    key_first, keys = packed_rows(b, cu_seqlens_k, total_k, total_k)
    row_begin = key_first
    row_end = key_first + keys
    if CAUSAL:
        row_end = tl.minimum(row_end, row_begin + (rows - query_first) + (keys - queries) + 1)
    inside = (rows >= query_first) & (rows < query_first + queries)
    return row_begin, tl.where(inside, tl.maximum(row_end, row_begin), row_begin)


@triton.jit
def seeing_rows(
    column_first, column_last, cu_seqlens_q, cu_seqlens_k, total_q, total_k, sequences, search_steps,
    CAUSAL: tl.constexpr,
):  # fmt: skip
    """Rows of the packed axis that see the keys column_first..column_last, which belong to sequences:
    (first row that sees any, first row from which on all are seen, one past the last row; the second is only then less
    than the third when all keys are of one sequence)."""
    b = sequence_of(column_first, cu_seqlens_k, sequences, search_steps)
    last_b = sequence_of(column_last, cu_seqlens_k, sequences, search_steps)
    query_first, queries = packed_rows(b, cu_seqlens_q, total_q, total_q)
    key_first, keys = packed_rows(b, cu_seqlens_k, total_k, total_k)
    last_first, last_queries = packed_rows(last_b, cu_seqlens_q, total_q, total_q)
    row_first = query_first
    row_whole = query_first
    if CAUSAL:
        diagonal = query_first + queries - key_first - keys  # row - diagonal is the last key that a row sees
        row_first = tl.minimum(tl.maximum(column_first + diagonal, query_first), query_first + queries)
        row_whole = tl.maximum(column_last + diagonal, query_first)
    row_stop = tl.maximum(last_first + last_queries, row_first)
    return row_first, tl.where(b == last_b, row_whole, row_stop), row_stop


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
def statistic_row(b, head, first, heads_q, total_q, PACKED: tl.constexpr):
    """Index of row `first` in a [B, Hq, Sq] (packed: [Hq, T]) statistic."""
    row = head.to(tl.int64) * total_q + first
    if not PACKED:
        row += b.to(tl.int64) * heads_q * total_q
    return row
