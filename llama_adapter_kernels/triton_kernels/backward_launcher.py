"""The op `backward`: which kernels run for the gradients that are asked for. Nothing here reads a value from the device."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llama_adapter_kernels.ops.arguments import Gradients, of_backward
from llama_adapter_kernels.triton_kernels import host, prefix, tuning
from llama_adapter_kernels.triton_kernels.backward_prefix import backward_prefix_kernel, backward_sums_kernel
from llama_adapter_kernels.triton_kernels.backward_rows import backward_rows_kernel
from llama_adapter_kernels.triton_kernels.backward_words import backward_words_kernel
from llama_adapter_kernels.triton_kernels.host import Mask, Sizes, blocks, gate_strides, run, strides
from llama_adapter_kernels.triton_kernels.tile_race import Tiles, choose, kind_of
from llama_adapter_kernels.triton_kernels.tuning import Tile, is_forced, tile_for

_SUMS_TILE = Tile(16, 128, 4, 1)
# Rows whose prefix gradients one program adds up: so many that the partial sums are small beside the tensors themselves.
_CHUNK_ROWS = 1024


@dataclass(frozen=True)
class _Inputs:
    """What every kernel of one backward pass reads."""

    size: Sizes
    query: Tensor
    key: Tensor
    value: Tensor
    doutput: Tensor
    prefix_key: Tensor | None
    prefix_value: Tensor | None
    gate: Tensor | None
    logsumexp: Tensor
    mask: Mask
    key_start: Tensor | None
    key_end: Tensor | None
    prefix_index: Tensor | None
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    scale: float
    is_causal: bool


@dataclass(frozen=True)
class _RowStatistics:
    """Float32, by row, except `windows`: int32 [T, 2], the keys that each row of a packed axis sees."""

    words: Tensor  # [.., rows, 2]: log-sum-exp in base 2, D_w
    windows: Tensor | None
    prefix_logsumexp: Tensor | None  # of a prefix longer than a tile
    prefix_delta: Tensor | None


@dataclass(frozen=True)
class _PrefixSums:
    """Partial gradients of prefix [B, Hq, chunks, 2, P, D] and gate [B, Hq, chunks], float32."""

    prefix: Tensor
    gate: Tensor
    chunks: int


def backward(*arguments: Any) -> Gradients:
    """(dquery, dkey, dvalue, dprefix_key, dprefix_value, dgate [A, Hq] float32); those not asked for have shape (0,).

    Always deterministic: no kernel uses atomics, so `deterministic` changes nothing.
    """
    doutput, (query, key, value, prefix_key, prefix_value, gate), output, logsumexp, options, needed = of_backward(
        arguments
    )
    attn_mask, key_start, key_end, prefix_index, cu_seqlens_q, cu_seqlens_k, *longest, scale, is_causal = options
    size = Sizes(query, key, prefix_key, prefix_index, cu_seqlens_q, *longest)
    q, k, v, do, o = (host.with_unit_stride(tensor) for tensor in (query, key, value, doutput, output))
    kp, vp = (None if tensor is None else host.with_unit_stride(tensor) for tensor in (prefix_key, prefix_value))
    inputs = _Inputs(
        size, q, k, v, do, kp, vp, gate, logsumexp, host.mask_view(attn_mask), key_start, key_end, prefix_index,
        cu_seqlens_q, cu_seqlens_k, scale, is_causal,
    )  # fmt: skip
    need_words = needed.dquery or needed.dkey_dvalue
    dquery, dkey, dvalue = (
        host.empty_rows_like(tensor) if wanted else None
        for tensor, wanted in ((query, needed.dquery), (key, needed.dkey_dvalue), (value, needed.dkey_dvalue))
    )
    none = query.new_empty(0)
    dprefix_key, dprefix_value, dgate = none, none, none
    if need_words or needed.dprefix:
        statistics, sums = _rows(inputs, o, need_words, needed.dprefix)
        if needed.dprefix and prefix_key is not None and prefix_value is not None and gate is not None:
            dprefix_key, dprefix_value = host.empty_rows_like(prefix_key), host.empty_rows_like(prefix_value)
            dgate = torch.zeros(size.prefix_count, size.heads_q, dtype=torch.float32, device=query.device)
            if size.prefix_length > 0:
                _prefix(inputs, statistics, sums, dprefix_key, dprefix_value, dgate)
            dprefix_key, dprefix_value = host.finish(dprefix_key, prefix_key), host.finish(dprefix_value, prefix_value)
        if need_words:
            _words(inputs, statistics, dquery, dkey, dvalue)
    if not size.tokens:
        for gradient, offsets in ((dquery, cu_seqlens_q), (dkey, cu_seqlens_k), (dvalue, cu_seqlens_k)):
            host.zero_tail(gradient, offsets)
    dquery, dkey, dvalue = (
        none if gradient is None else host.finish(gradient, like)
        for gradient, like in ((dquery, query), (dkey, key), (dvalue, value))
    )
    return dquery, dkey, dvalue, dprefix_key, dprefix_value, dgate


def _rows(inputs: _Inputs, output: Tensor, need_words: bool, need_dprefix: bool) -> tuple[_RowStatistics, _PrefixSums]:
    size, q, do = inputs.size, inputs.query, inputs.doutput
    tile = tile_for("backward_rows", q.dtype, size.head_dim, q.device)
    tiles = blocks(size.seq_q, tile.block_m)
    wanted = blocks(2 * tuning.processors(q.device), max(size.batch * size.heads_q, 1))
    chunks = max(1, min(tiles, max(wanted, blocks(size.seq_q, _CHUNK_ROWS))))
    long_prefix = size.prefix == prefix.PREFIX_LOOP.value
    statistics = _RowStatistics(
        torch.empty(*inputs.logsumexp.shape, 2, dtype=torch.float32, device=q.device),
        torch.empty(size.total_q, 2, dtype=torch.int32, device=q.device) if size.tokens else None,
        torch.empty_like(inputs.logsumexp) if long_prefix else None,
        torch.empty_like(inputs.logsumexp) if long_prefix else None,
    )
    slots = size.prefix_length if need_dprefix else 0
    shape = (size.batch, size.heads_q, chunks)
    sums = _PrefixSums(
        torch.empty(*shape, 2, slots, size.head_dim, dtype=torch.float32, device=q.device),
        torch.empty(shape, dtype=torch.float32, device=q.device),
        chunks,
    )
    run(
        backward_rows_kernel, (chunks * size.heads_q * size.batch,), q.device, tile,
        q, inputs.key, inputs.value, do, output, inputs.logsumexp, inputs.prefix_key, inputs.prefix_value, inputs.gate,
        inputs.mask.tensor, inputs.key_start, inputs.key_end, inputs.prefix_index, inputs.cu_seqlens_q,
        inputs.cu_seqlens_k, statistics.words, statistics.windows, statistics.prefix_logsumexp, statistics.prefix_delta,
        sums.prefix, sums.gate,
        strides(q), strides(inputs.key), strides(inputs.value), strides(do), strides(output),
        strides(inputs.prefix_key), strides(inputs.prefix_value), *gate_strides(inputs.gate), *inputs.mask.strides,
        size.heads_q, size.group, *size.extents, chunks, inputs.scale, host.log2_scale(inputs.scale),
        HEAD_DIM=size.head_dim, BLOCK_D=size.block_d, BLOCK_M=tile.block_m,
        BLOCK_N=16 if inputs.mask.tensor is None else 32, BLOCK_P=size.block_p, PREFIX=size.prefix,
        NEED_DELTA=need_words, NEED_PREFIX=need_dprefix, CAUSAL=inputs.is_causal, MASK=inputs.mask.kind,
        TOKENS=size.tokens,
        ALIGNMENT=host.alignment(q, inputs.key, inputs.value, do, output, inputs.prefix_key, inputs.prefix_value),
    )  # fmt: skip
    return statistics, sums


def _prefix(
    inputs: _Inputs, statistics: _RowStatistics, sums: _PrefixSums, dprefix_key: Tensor, dprefix_value: Tensor,
    dgate: Tensor,
) -> None:  # fmt: skip
    size, q, do = inputs.size, inputs.query, inputs.doutput
    if size.prefix == prefix.PREFIX_LOOP.value:
        tile = tile_for("backward_rows", q.dtype, size.head_dim, q.device)
        programs = sums.chunks * blocks(size.prefix_length, size.block_p) * size.heads_q * size.batch
        run(
            backward_prefix_kernel, (programs,), q.device, tile,
            q, do, inputs.prefix_key, inputs.prefix_value, inputs.gate, inputs.prefix_index, inputs.cu_seqlens_q,
            statistics.prefix_logsumexp, statistics.prefix_delta, sums.prefix,
            strides(q), strides(do), strides(inputs.prefix_key), strides(inputs.prefix_value),
            *gate_strides(inputs.gate), size.heads_q, size.group, size.seq_q, size.total_q, size.sequences,
            size.prefix_count, size.prefix_length, sums.chunks, inputs.scale, host.log2_scale(inputs.scale),
            HEAD_DIM=size.head_dim, BLOCK_D=size.block_d, BLOCK_M=tile.block_m, BLOCK_P=size.block_p,
            TOKENS=size.tokens, ALIGNMENT=host.alignment(q, do, inputs.prefix_key, inputs.prefix_value),
        )  # fmt: skip
    columns = 2 * size.prefix_length * size.head_dim
    block_c = min(_SUMS_TILE.block_n, host.block_of(columns))
    run(
        backward_sums_kernel, (size.prefix_count * size.heads_kv, blocks(columns, block_c) + 1), q.device, _SUMS_TILE,
        sums.prefix, sums.gate, inputs.prefix_index, dprefix_key, dprefix_value, dgate,
        strides(dprefix_key), strides(dprefix_value), size.batch, sums.chunks, size.heads_q, size.group,
        size.prefix_length,
        HEAD_DIM=size.head_dim, BLOCK_R=_SUMS_TILE.block_m, BLOCK_C=block_c,
        SHARED=inputs.prefix_index is None and size.prefix_count == 1,
    )  # fmt: skip


def _words(
    inputs: _Inputs, statistics: _RowStatistics, dquery: Tensor | None, dkey: Tensor | None, dvalue: Tensor | None
) -> None:
    size, q, k, v, do = inputs.size, inputs.query, inputs.key, inputs.value, inputs.doutput
    whole_axis = inputs.cu_seqlens_q is None or size.tokens

    def launch(tiles: Tiles) -> None:
        keys, queries = tiles
        key_blocks = 0 if dkey is None else blocks(size.seq_k, keys.block_n)
        row_blocks = 0 if dquery is None else blocks(size.seq_q, queries.block_m)
        row_descriptors, key_descriptors = (
            [host.descriptor(tensor, rows, size.block_d) if whole_axis else None for tensor in tensors]
            for tensors, rows in (((q, do), keys.block_m), ((k, v), queries.block_n))
        )
        run(
            backward_words_kernel, ((key_blocks + row_blocks * size.group) * size.heads_kv * size.batch,), q.device, keys,
            q, k, v, inputs.prefix_key, inputs.prefix_value, inputs.gate, do, statistics.words,
            statistics.windows, statistics.prefix_logsumexp, statistics.prefix_delta, dquery, dkey, dvalue,
            inputs.mask.tensor, inputs.key_start, inputs.key_end, inputs.prefix_index, inputs.cu_seqlens_q,
            inputs.cu_seqlens_k, *row_descriptors, *key_descriptors,
            strides(q), strides(k), strides(v), strides(inputs.prefix_key), strides(inputs.prefix_value), strides(do),
            strides(dquery), strides(dkey), strides(dvalue), *gate_strides(inputs.gate), *inputs.mask.strides,
            size.heads_q, size.heads_kv, size.group, *size.extents, inputs.scale, host.log2_scale(inputs.scale),
            HEAD_DIM=size.head_dim, BLOCK_D=size.block_d, KEYS_M=keys.block_m, KEYS_N=keys.block_n,
            QUERIES_M=queries.block_m, QUERIES_N=queries.block_n, BLOCK_P=size.block_p, PREFIX=size.prefix,
            CAUSAL=inputs.is_causal, MASK=inputs.mask.kind, TOKENS=size.tokens,
            ALIGNMENT=host.alignment(q, k, v, inputs.prefix_key, inputs.prefix_value, do, dquery, dkey, dvalue),
        )  # fmt: skip

    phases = ("backward_keys", "backward_queries")
    default = tuple(tile_for(phase, q.dtype, size.head_dim, q.device, size.tokens) for phase in phases)
    kind = kind_of("backward_words", q, size.seq_q, inputs.is_causal, size.tokens)
    launch(choose(kind, q.device, default, is_forced(*phases), launch))
