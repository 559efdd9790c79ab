"""The ops' implementations: allocate results, choose tiles, launch. Nothing here reads a value from the device."""

import torch
from torch import Tensor

from llama_adapter_kernels.triton_kernels import tiles, tuning
from llama_adapter_kernels.triton_kernels.backward_kernels import key_gradient_kernel, query_gradient_kernel
from llama_adapter_kernels.triton_kernels.decode_kernels import combine_kernel, split_kernel
from llama_adapter_kernels.triton_kernels.forward_kernels import clear_tail_kernel, forward_kernel
from llama_adapter_kernels.triton_kernels.host import (
    LARGEST_PREFIX_TILE,
    alignment,
    block_of,
    empty_rows_like,
    finish,
    gate_strides,
    log2_scale,
    mask_view,
    run,
    strides,
    with_unit_stride,
)
from llama_adapter_kernels.triton_kernels.prefix_kernels import (
    prefix_gradient_kernel,
    reduce_kernel,
    statistics_kernel,
)
from llama_adapter_kernels.triton_kernels.tuning import Tile, tile_for

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]

_TAIL_TILE = Tile(64, 0, 4, 1)
_REDUCE_TILE = Tile(16, 0, 4, 1)
_COMBINE_TILE = Tile(1, 0, 4, 1)
_REDUCE_COLUMNS = 128


class _Sizes:
    """Sizes of a padded ([B, H, S, D]) or packed ([T, H, D] with cu_seqlens) problem."""

    def __init__(self, query: Tensor, key: Tensor, cu_seqlens_q: Tensor | None, longest_q: int, longest_k: int) -> None:
        self.head_dim = query.shape[-1]
        self.heads_q, self.heads_kv = query.shape[1], key.shape[1]
        self.group = self.heads_q // self.heads_kv
        if cu_seqlens_q is None:
            self.batch = query.shape[0]
            self.seq_q, self.seq_k = query.shape[2], key.shape[2]
            self.total_q, self.total_k = self.seq_q, self.seq_k
        else:
            self.batch = cu_seqlens_q.shape[0] - 1
            self.total_q, self.total_k = query.shape[0], key.shape[0]
            self.seq_q, self.seq_k = min(longest_q, self.total_q), min(longest_k, self.total_k)
        self.block_d = block_of(self.head_dim)


def _prefix_kind(prefix_length: int) -> tuple[int, int]:
    """(how the kernels treat a prefix of this length, slots of a tile)."""
    if prefix_length == 0:
        return tiles.PREFIX_NONE.value, 16
    block = min(block_of(prefix_length), LARGEST_PREFIX_TILE)
    return (tiles.PREFIX_ONE_TILE if prefix_length <= block else tiles.PREFIX_LOOP).value, block


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor | None,
    prefix_value: Tensor | None,
    gate: Tensor | None,
    attn_mask: Tensor | None,
    key_start: Tensor | None,
    key_end: Tensor | None,
    prefix_index: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    is_causal: bool,
) -> tuple[Tensor, Tensor]:
    """(output like query, log-sum-exp of the words [B, Hq, Sq] or packed [Hq, T], float32). Arguments are the op's."""
    size = _Sizes(query, key, cu_seqlens_q, max_seqlen_q, max_seqlen_k)
    q, k, v = (with_unit_stride(tensor) for tensor in (query, key, value))
    output = empty_rows_like(query)
    rows = (size.batch, size.heads_q, size.total_q) if cu_seqlens_q is None else (size.heads_q, size.total_q)
    logsumexp = torch.empty(rows, dtype=torch.float32, device=query.device)
    kp, vp = (None if tensor is None else with_unit_stride(tensor) for tensor in (prefix_key, prefix_value))
    prefix_count, prefix_length = (0, 0) if kp is None else (kp.shape[0], kp.shape[2])
    prefix_kind, block_p = _prefix_kind(prefix_length)
    mask = mask_view(attn_mask)
    tile = tile_for("forward", query.dtype, size.head_dim, query.device)
    row_blocks = -(-size.seq_q // tile.block_m)
    run(
        forward_kernel, (row_blocks * size.heads_q * size.batch,), query.device, tile,
        q, k, v, kp, vp, gate, output, logsumexp,
        mask.tensor, key_start, key_end, prefix_index, cu_seqlens_q, cu_seqlens_k,
        strides(q), strides(k), strides(v), strides(kp), strides(vp), strides(output),
        *gate_strides(gate), *mask.strides,
        size.heads_q, size.group, size.seq_q, size.seq_k, size.total_q, size.total_k, prefix_count, prefix_length,
        log2_scale(scale),
        HEAD_DIM=size.head_dim, BLOCK_D=size.block_d, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_P=block_p,
        PREFIX=prefix_kind, CAUSAL=is_causal, MASK=mask.kind, ELEMENTWISE=attn_mask is not None or scale <= 0,
        ALIGNMENT=alignment(q, k, v, kp, vp, output),
    )  # fmt: skip
    _clear_tail(output, cu_seqlens_q)
    return finish(output, query), logsumexp


def backward(
    doutput: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor | None,
    prefix_value: Tensor | None,
    gate: Tensor | None,
    output: Tensor,
    logsumexp: Tensor,
    attn_mask: Tensor | None,
    key_start: Tensor | None,
    key_end: Tensor | None,
    prefix_index: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    is_causal: bool,
    need_dquery: bool,
    need_dkey_dvalue: bool,
    need_dprefix: bool,
    deterministic: bool,
) -> Gradients:
    """(dquery, dkey, dvalue, dprefix_key, dprefix_value, dgate [A, Hq] float32); those not asked for have shape (0,).

    Always deterministic: no kernel uses atomics, so `deterministic` changes nothing.
    """
    size = _Sizes(query, key, cu_seqlens_q, max_seqlen_q, max_seqlen_k)
    q, k, v, do, o = (with_unit_stride(tensor) for tensor in (query, key, value, doutput, output))
    kp, vp = (None if tensor is None else with_unit_stride(tensor) for tensor in (prefix_key, prefix_value))
    prefix_count, prefix_length = (0, 0) if kp is None else (kp.shape[0], kp.shape[2])
    has_prefix = prefix_length > 0
    need_words = need_dquery or need_dkey_dvalue
    device, dtype = query.device, query.dtype
    scale_log2 = log2_scale(scale)
    mask = mask_view(attn_mask)
    _, block_p = _prefix_kind(prefix_length)
    common = {"HEAD_DIM": size.head_dim, "BLOCK_D": size.block_d}
    dquery, dkey, dvalue = (
        empty_rows_like(tensor) if needed else query.new_empty(0)
        for tensor, needed in ((query, need_dquery), (key, need_dkey_dvalue), (value, need_dkey_dvalue))
    )
    dprefix_key, dprefix_value, dgate = (query.new_empty(0) for _ in range(3))

    # Row statistics, and per block of rows the sum that becomes the gate's gradient.
    tile = tile_for("prefix", dtype, size.head_dim, device)
    row_blocks = -(-size.seq_q // tile.block_m)
    delta, prefix_logsumexp, prefix_delta = (torch.empty_like(logsumexp) for _ in range(3))
    dgate_partial = torch.empty(size.batch, size.heads_q, row_blocks, dtype=torch.float32, device=device)
    if need_words or need_dprefix:
        run(
            statistics_kernel, (row_blocks * size.heads_q * size.batch,), device, tile,
            q, k, v, do, o, logsumexp, kp, vp, gate, mask.tensor, key_start, key_end, prefix_index, cu_seqlens_q,
            cu_seqlens_k, delta, prefix_logsumexp, prefix_delta, dgate_partial,
            strides(q), strides(k), strides(v), strides(do), strides(o), strides(kp), strides(vp),
            *gate_strides(gate), *mask.strides,
            size.heads_q, size.group, size.seq_q, size.seq_k, size.total_q, size.total_k, prefix_count, prefix_length,
            scale_log2,
            **common, BLOCK_M=tile.block_m, BLOCK_N=16 if attn_mask is None else 32, BLOCK_P=block_p,
            HAS_PREFIX=has_prefix, NEED_DELTA=need_words, CAUSAL=is_causal, MASK=mask.kind,
            ALIGNMENT=alignment(q, k, v, do, o, kp, vp),
        )  # fmt: skip
    if need_dprefix and kp is not None and vp is not None and gate is not None:
        dgate = torch.zeros(prefix_count, size.heads_q, dtype=torch.float32, device=device)
        dprefix_key, dprefix_value = empty_rows_like(kp), empty_rows_like(vp)
        if has_prefix:
            slot_blocks = -(-prefix_length // block_p)
            programs = size.batch * size.heads_q * slot_blocks
            splits = max(1, min(row_blocks, 4 * tuning.processors(device) // max(programs, 1)))
            partial = torch.empty(
                size.batch, size.heads_q, splits, 2, prefix_length, size.head_dim, dtype=torch.float32, device=device
            )
            run(
                prefix_gradient_kernel, (programs * splits,), device, tile,
                q, do, kp, vp, gate, prefix_index, cu_seqlens_q, prefix_logsumexp, prefix_delta, partial,
                strides(q), strides(do), strides(kp), strides(vp), *gate_strides(gate), size.heads_q, size.group,
                size.seq_q, size.total_q, prefix_count, prefix_length, splits, scale, scale_log2,
                **common, BLOCK_M=tile.block_m, BLOCK_P=block_p, ALIGNMENT=alignment(q, do, kp, vp),
            )  # fmt: skip
            # Per key/value head: splits * group partial sums that lie one after the other.
            for gradient, first in ((dprefix_key, partial), (dprefix_value, partial[:, :, :, 1:])):
                _reduce(first, gradient, size.batch, size.group * splits, partial.stride(0),
                        size.group * partial.stride(1), partial.stride(2), prefix_length * size.head_dim,
                        size.head_dim, prefix_index)  # fmt: skip
            _reduce(dgate_partial, dgate[:, :, None, None], size.batch, row_blocks, dgate_partial.stride(0),
                    dgate_partial.stride(1), 1, 1, 1, prefix_index)  # fmt: skip

    if need_dkey_dvalue:
        tile = tile_for("key_gradient", dtype, size.head_dim, device)
        run(
            key_gradient_kernel, (-(-size.seq_k // tile.block_n) * size.heads_kv * size.batch,), device, tile,
            q, k, v, do, logsumexp, delta, dkey, dvalue, mask.tensor, key_start, key_end, cu_seqlens_q, cu_seqlens_k,
            strides(q), strides(k), strides(v), strides(do), strides(dkey), strides(dvalue), *mask.strides,
            size.heads_kv, size.group, size.seq_q, size.seq_k, size.total_q, size.total_k, scale, scale_log2,
            **common, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, CAUSAL=is_causal, MASK=mask.kind,
            ALIGNMENT=alignment(q, k, v, do, dkey, dvalue),
        )  # fmt: skip
        _clear_tail(dkey, cu_seqlens_k)
        _clear_tail(dvalue, cu_seqlens_k)
        dkey, dvalue = finish(dkey, key), finish(dvalue, value)
    if need_dquery:
        tile = tile_for("query_gradient", dtype, size.head_dim, device)
        run(
            query_gradient_kernel, (-(-size.seq_q // tile.block_m) * size.heads_q * size.batch,), device, tile,
            q, k, v, kp, vp, gate, do, logsumexp, delta, prefix_logsumexp, prefix_delta, dquery,
            mask.tensor, key_start, key_end, prefix_index, cu_seqlens_q, cu_seqlens_k,
            strides(q), strides(k), strides(v), strides(kp), strides(vp), strides(do), strides(dquery),
            *gate_strides(gate), *mask.strides,
            size.heads_q, size.group, size.seq_q, size.seq_k, size.total_q, size.total_k, prefix_count, prefix_length,
            scale, scale_log2,
            **common, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_P=block_p, HAS_PREFIX=has_prefix,
            CAUSAL=is_causal, MASK=mask.kind, ALIGNMENT=alignment(q, k, v, kp, vp, do, dquery),
        )  # fmt: skip
        _clear_tail(dquery, cu_seqlens_q)
        dquery = finish(dquery, query)
    if need_dprefix and prefix_key is not None and prefix_value is not None:
        dprefix_key, dprefix_value = finish(dprefix_key, prefix_key), finish(dprefix_value, prefix_value)
    return dquery, dkey, dvalue, dprefix_key, dprefix_value, dgate


def decode(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    prefix_key: Tensor | None,
    prefix_value: Tensor | None,
    gate: Tensor | None,
    key_start: Tensor | None,
    key_end: Tensor | None,
    prefix_index: Tensor | None,
    scale: float,
    is_causal: bool,
) -> Tensor:
    """Output like query [B, Hq, Sq, D] of few queries against a cache [B, Hkv, S, D]."""
    size = _Sizes(query, key_cache, None, 0, 0)
    q, k, v = (with_unit_stride(tensor) for tensor in (query, key_cache, value_cache))
    kp, vp = (None if tensor is None else with_unit_stride(tensor) for tensor in (prefix_key, prefix_value))
    prefix_count, prefix_length = (0, 0) if kp is None else (kp.shape[0], kp.shape[2])
    prefix_kind, block_p = _prefix_kind(prefix_length)
    output = empty_rows_like(query)
    tile = tile_for("decode", query.dtype, size.head_dim, query.device)
    # More rows than the smallest tile (several new tokens, large groups): a larger one, so that keys are read once.
    block_m = min(max(tile.block_m, block_of(size.group * size.seq_q)), 64)
    programs = -(-size.group * size.seq_q // block_m) * size.heads_kv * size.batch
    splits = _splits(size, tile, programs, query.device)
    combine = splits > 1
    shape = (size.batch, size.heads_q, size.seq_q, splits) if combine else (0,)
    partial = torch.empty(*shape, size.head_dim, dtype=torch.float32, device=query.device)
    partial_logsumexp = torch.empty(shape, dtype=torch.float32, device=query.device)
    packed = alignment(q, k, v, kp, vp, output)
    prefix_arguments = (prefix_count, prefix_length, log2_scale(scale))
    run(
        split_kernel, (programs * splits,), query.device, tile,
        q, k, v, kp, vp, gate, output, partial, partial_logsumexp, key_start, key_end, prefix_index,
        strides(q), strides(k), strides(v), strides(kp), strides(vp), strides(output), *gate_strides(gate),
        size.heads_kv, size.group, size.seq_q, size.seq_k, splits, *prefix_arguments,
        HEAD_DIM=size.head_dim, BLOCK_D=size.block_d, BLOCK_M=block_m, BLOCK_N=tile.block_n, BLOCK_P=block_p,
        PREFIX=prefix_kind, CAUSAL=is_causal, ELEMENTWISE=scale <= 0, COMBINE=combine, ALIGNMENT=packed,
    )  # fmt: skip
    if combine:
        run(
            combine_kernel, (size.batch * size.heads_q * size.seq_q,), query.device, _COMBINE_TILE,
            q, kp, vp, gate, output, partial, partial_logsumexp, prefix_index,
            strides(q), strides(kp), strides(vp), strides(output), *gate_strides(gate),
            size.heads_q, size.group, size.seq_q, splits, *prefix_arguments,
            HEAD_DIM=size.head_dim, BLOCK_D=size.block_d, BLOCK_S=block_of(splits, 2), BLOCK_P=min(block_p, 16),
            HAS_PREFIX=prefix_length > 0, ALIGNMENT=packed,
        )  # fmt: skip
    return finish(output, query)


# The parts of a row are combined in registers; more than this would not fit there.
_MOST_SPLITS = 32


def _splits(size: _Sizes, tile: Tile, programs: int, device: torch.device) -> int:
    """Enough splits for two programs per processor, each with at least two blocks of the cache's capacity."""
    wanted = -(-2 * tuning.processors(device) // max(programs, 1))
    splits: int = max(1, min(wanted, size.seq_k // (2 * tile.block_n), _MOST_SPLITS))
    return splits


def _reduce(
    partial: Tensor,
    result: Tensor,
    sequences: int,
    per_sequence: int,
    sequence_stride: int,
    head_stride: int,
    stride: int,
    columns: int,
    head_dim: int,
    prefix_index: Tensor | None,
) -> None:
    """result [A, H, P, D] = sums of partial results, see `reduce_kernel`."""
    count, heads = result.shape[:2]
    run(
        reduce_kernel, (count * heads, -(-columns // _REDUCE_COLUMNS)), partial.device, _REDUCE_TILE,
        partial, result, prefix_index, sequences, per_sequence, sequence_stride, head_stride, stride, columns, heads,
        strides(result), HEAD_DIM=head_dim, BLOCK_R=_REDUCE_TILE.block_m,
        BLOCK_C=min(_REDUCE_COLUMNS, block_of(columns)), SHARED=prefix_index is None and count == 1,
    )  # fmt: skip


def _clear_tail(tensor: Tensor, cu_seqlens: Tensor | None) -> None:
    """Packed tensors: rows after the last sequence become zero, so that a gradient never holds what memory held."""
    if cu_seqlens is None:
        return
    total, heads, head_dim = tensor.shape
    run(
        clear_tail_kernel, (-(-total // _TAIL_TILE.block_m),), tensor.device, _TAIL_TILE,
        tensor, cu_seqlens, tensor.stride(1), tensor.stride(0), total, cu_seqlens.shape[0] - 1, heads,
        HEAD_DIM=head_dim, BLOCK_D=block_of(head_dim), ROWS=_TAIL_TILE.block_m,
    )  # fmt: skip
