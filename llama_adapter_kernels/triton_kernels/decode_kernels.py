# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Decode: few queries against a long cache. Reading the cache is the cost, so the keys of a sequence are split over the
processor, and the query heads of a group share one tile, so that a key is read once for all of them.

    decode_split    (split, sequence, key/value head): a part of the words, normalised by itself
    decode_combine  (sequence, head, query): adds the parts, and the prefix once

With a single split nothing is left to combine, and the split kernel finishes the rows itself.
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
from llama_adapter_kernels.triton_kernels.problem import choose_prefix, load_gate, valid_keys
from llama_adapter_kernels.triton_kernels.scores import MASK_NONE, attend, normalise
from llama_adapter_kernels.triton_kernels.tiles import (
    head_rows,
    load_tile,
    loop_bound,
    offset,
    store_tile,
    tile_offsets,
)

VARYING = (
    "gate_stride_prefix", "gate_stride_head", "heads_q", "heads_kv", "group", "seq_q", "seq_k", "splits",
    "prefix_count", "prefix_length",
)  # fmt: skip


@triton.jit(do_not_specialize=VARYING)
def decode_split_kernel(
    query, key, value, prefix_key, prefix_value, gate, output, partial, partial_logsumexp,
    key_start, key_end, prefix_index,
    query_strides, key_strides, value_strides, prefix_key_strides, prefix_value_strides, output_strides,
    gate_stride_prefix, gate_stride_head,
    heads_kv, group, seq_q, seq_k, splits, prefix_count, prefix_length, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr, PREFIX: tl.constexpr, CAUSAL: tl.constexpr, ELEMENTWISE: tl.constexpr,
    COMBINE: tl.constexpr, ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """Rows are (head of the group, query). COMBINE: writes partial [B, Hq, Sq, splits, D] and base-2 log-sum-exp."""
    program = tl.program_id(0)
    row_blocks = tl.cdiv(group * seq_q, BLOCK_M)
    split = program % splits
    row = (program // splits) % row_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    head_kv = (program // (splits * row_blocks)) % heads_kv
    b = program // (splits * row_blocks * heads_kv)
    row_valid = row < group * seq_q
    head = head_kv * group + row // seq_q  # per row
    position = row % seq_q
    begin, end = valid_keys(b, key_start, key_end, seq_k + 0)
    rows_offset = offset(head, query_strides[1], ALIGNMENT) + offset(position, query_strides[2], ALIGNMENT)
    lanes = tl.arange(0, BLOCK_D)[None, :]
    query_tile = query + offset(b, query_strides[0], ALIGNMENT) + rows_offset[:, None] + lanes
    q = load_tile(query_tile, row_valid, HEAD_DIM, BLOCK_D, True)
    column = tl.arange(0, BLOCK_N)
    key_tile = head_rows(key, b, head_kv, b * 0, key_strides, ALIGNMENT)
    key_tile += tile_offsets(column, key_strides[2], BLOCK_D, ALIGNMENT)
    value_tile = head_rows(value, b, head_kv, b * 0, value_strides, ALIGNMENT)
    value_tile += tile_offsets(column, value_strides[2], BLOCK_D, ALIGNMENT)

    # This split's keys; blocks stay whole, so the last splits of a short cache may be empty.
    span = tl.cdiv(tl.cdiv(end - begin, splits), BLOCK_N) * BLOCK_N
    first = begin + split * span
    last = tl.minimum(first + span, end)
    row_limit = tl.zeros([BLOCK_M], tl.int32) + end
    whole = last
    if CAUSAL:
        row_limit = position + (end - seq_q) + 1  # the last query's is `end`
        whole = tl.minimum(last, end - seq_q + 1)
    blocks = tl.cdiv(tl.maximum(last - first, 0), BLOCK_N)
    whole_blocks = tl.maximum(whole - first, 0) // BLOCK_N
    if ELEMENTWISE:
        whole_blocks = blocks * 0
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    if not ELEMENTWISE:
        acc, row_sum, row_max = attend(
            acc, row_sum, row_max, q, key_tile, value_tile, None, None, b, head_kv, row, key_strides[2],
            value_strides[2], 0, first, whole_blocks, last, row, row_limit, row_valid, scale_log2,
            BLOCK_N, HEAD_DIM, BLOCK_D, False, False, MASK_NONE, False, ALIGNMENT,
        )  # fmt: skip
    acc, row_sum, row_max = attend(
        acc, row_sum, row_max, q, key_tile, value_tile, None, None, b, head_kv, row, key_strides[2],
        value_strides[2], 0, first + whole_blocks * BLOCK_N, blocks - whole_blocks, last, row, row_limit, row_valid,
        scale_log2, BLOCK_N, HEAD_DIM, BLOCK_D, True, ELEMENTWISE, MASK_NONE, False, ALIGNMENT,
    )  # fmt: skip
    acc, row_logsumexp = normalise(acc, row_sum, row_max)

    if COMBINE:
        heads_q = heads_kv * group
        part = ((b.to(tl.int64) * heads_q + head) * seq_q + position) * splits + split
        tl.store(partial_logsumexp + part, row_logsumexp, mask=row_valid)
        store_tile(partial + part[:, None] * HEAD_DIM + lanes, acc, row_valid, HEAD_DIM, BLOCK_D)
    else:
        if PREFIX != PREFIX_NONE:
            entry, slots, bad = choose_prefix(b, prefix_index, prefix_count, prefix_length)
            gate_value = load_row_gates(gate, entry, head, slots, bad, row_valid, gate_stride_prefix, gate_stride_head)
            if PREFIX == PREFIX_ONE_TILE:
                prefix_k = load_slots(prefix_key, entry, head_kv, slots * 0, slots, prefix_key_strides,
                                      BLOCK_P, HEAD_DIM, BLOCK_D, ALIGNMENT)  # fmt: skip
                prefix_v = load_slots(prefix_value, entry, head_kv, slots * 0, slots, prefix_value_strides,
                                      BLOCK_P, HEAD_DIM, BLOCK_D, ALIGNMENT)  # fmt: skip
                acc = add_prefix_tile(acc, q, prefix_k, prefix_v, slots, gate_value, scale_log2, BLOCK_P)
            if PREFIX == PREFIX_LOOP:
                acc = add_prefix_loop(
                    acc, q, prefix_key, prefix_value, prefix_key_strides, prefix_value_strides, entry, head_kv, slots,
                    gate_value, scale_log2, BLOCK_M, BLOCK_P, HEAD_DIM, BLOCK_D, ALIGNMENT,
                )  # fmt: skip
        rows_offset = offset(head, output_strides[1], ALIGNMENT) + offset(position, output_strides[2], ALIGNMENT)
        output_tile = output + offset(b, output_strides[0], ALIGNMENT) + rows_offset[:, None]
        store_tile(output_tile + lanes, acc, row_valid, HEAD_DIM, BLOCK_D)


@triton.jit
def load_row_gates(gate, entry, head, slots, bad, row_valid, gate_stride_prefix, gate_stride_head):
    """As load_gate, for a vector of heads."""
    pointers = gate + entry.to(tl.int64) * gate_stride_prefix + head.to(tl.int64) * gate_stride_head
    # Not `row_valid & (slots > 0)`: the interpreter of Triton 3.9 takes no mask made of a vector and a scalar.
    values = tl.load(pointers, mask=row_valid.to(tl.int32) * slots > 0, other=0.0).to(tl.float32)
    return tl.where(bad, float("nan"), values)


@triton.jit(do_not_specialize=VARYING)
def decode_combine_kernel(
    query, prefix_key, prefix_value, gate, output, partial, partial_logsumexp, prefix_index,
    query_strides, prefix_key_strides, prefix_value_strides, output_strides, gate_stride_prefix, gate_stride_head,
    heads_q, group, seq_q, splits, prefix_count, prefix_length, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_P: tl.constexpr,
    HAS_PREFIX: tl.constexpr, ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """One row: the parts weighted by their share of the whole softmax, then the prefix. All parts are read at once."""
    program = tl.program_id(0)
    position = program % seq_q
    head = (program // seq_q) % heads_q
    b = program // (seq_q * heads_q)
    part = tl.arange(0, BLOCK_S)
    dim = tl.arange(0, BLOCK_D)
    first = program.to(tl.int64) * splits  # programs count rows in the order of the parts
    part_logsumexp = tl.load(partial_logsumexp + first + part, mask=part < splits, other=float("-inf"))
    largest = tl.max(part_logsumexp, 0)
    weights = tl.exp2(part_logsumexp - tl.where(largest == float("-inf"), 0.0, largest))
    total = tl.sum(weights, 0)
    weights = weights / tl.where(total == 0.0, 1.0, total)
    parts = load_tile(partial + (first + part)[:, None] * HEAD_DIM + dim[None, :], part < splits,
                      HEAD_DIM, BLOCK_D, True)  # fmt: skip
    acc = tl.sum(parts * weights[:, None], 0)

    if HAS_PREFIX:
        entry, slots, bad = choose_prefix(b, prefix_index, prefix_count, prefix_length)
        gate_value = load_gate(gate, entry, head, slots, bad, gate_stride_prefix, gate_stride_head)
        query_row = head_rows(query, b, head, position, query_strides, ALIGNMENT)
        q = tl.load(query_row + dim, mask=dim < HEAD_DIM, other=0.0).to(tl.float32)
        head_kv = head // group
        prefix_acc = tl.zeros([BLOCK_D], tl.float32)
        total = tl.zeros([1], tl.float32)
        largest = tl.full([1], float("-inf"), tl.float32)
        for tile in tl.range(0, loop_bound(tl.cdiv(slots, BLOCK_P))):
            first_slot = slots * 0 + tile * BLOCK_P
            slot = first_slot + tl.arange(0, BLOCK_P)
            prefix_k = load_slots(prefix_key, entry, head_kv, first_slot, slots, prefix_key_strides,
                                  BLOCK_P, HEAD_DIM, BLOCK_D, ALIGNMENT)  # fmt: skip
            prefix_v = load_slots(prefix_value, entry, head_kv, first_slot, slots, prefix_value_strides,
                                  BLOCK_P, HEAD_DIM, BLOCK_D, ALIGNMENT)  # fmt: skip
            scores = tl.sum(prefix_k.to(tl.float32) * q[None, :], 1) * scale_log2
            scores = tl.where(slot < slots, scores, float("-inf"))
            new_largest = tl.maximum(largest, tl.max(scores, 0))
            rescale = tl.exp2(largest - new_largest)
            slot_weights = tl.exp2(scores - new_largest)
            total = total * rescale + tl.sum(slot_weights, 0)
            prefix_acc = prefix_acc * rescale + tl.sum(slot_weights[:, None] * prefix_v.to(tl.float32), 0)
            largest = new_largest
        acc += prefix_acc * tl.where(total == 0.0, gate_value * 0.0, gate_value / total)
    output_row = head_rows(output, b, head, position, output_strides, ALIGNMENT)
    tl.store(output_row + dim, acc.to(output.dtype.element_ty), mask=dim < HEAD_DIM)
