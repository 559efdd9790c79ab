"""The ops `forward` and `decode`: allocate results, choose tiles, launch. Nothing here reads a value from the device."""

from typing import Any

import torch
from torch import Tensor

from llama_adapter_kernels.ops.arguments import of_forward
from llama_adapter_kernels.triton_kernels import tuning
from llama_adapter_kernels.triton_kernels.decode_kernels import decode_combine_kernel, decode_split_kernel
from llama_adapter_kernels.triton_kernels.forward_kernel import forward_kernel
from llama_adapter_kernels.triton_kernels.host import (
    Sizes,
    alignment,
    block_of,
    blocks,
    descriptor,
    empty_rows_like,
    finish,
    gate_strides,
    log2_scale,
    mask_view,
    run,
    strides,
    with_unit_stride,
    zero_tail,
)
from llama_adapter_kernels.triton_kernels.tile_race import Tiles, choose, kind_of
from llama_adapter_kernels.triton_kernels.tuning import Tile, is_forced, tile_for

_COMBINE_TILE = Tile(1, 0, 4, 1)


def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    """(output like query, log-sum-exp of the words [B, Hq, Sq] or packed [Hq, T], float32). Arguments are the op's."""
    (query, key, value, prefix_key, prefix_value, gate), options = of_forward(arguments)
    attn_mask, key_start, key_end, prefix_index, cu_seqlens_q, cu_seqlens_k, *longest, scale, is_causal = options
    size = Sizes(query, key, prefix_key, prefix_index, cu_seqlens_q, *longest)
    q, k, v = (with_unit_stride(tensor) for tensor in (query, key, value))
    kp, vp = (None if tensor is None else with_unit_stride(tensor) for tensor in (prefix_key, prefix_value))
    output = empty_rows_like(query)
    rows = (size.batch, size.heads_q, size.total_q) if cu_seqlens_q is None else (size.heads_q, size.total_q)
    logsumexp = torch.empty(rows, dtype=torch.float32, device=query.device)
    mask = mask_view(attn_mask)
    whole_axis = cu_seqlens_q is None or size.tokens

    def launch(tiles: Tiles) -> None:
        (tile,) = tiles
        run(
            forward_kernel, (blocks(size.seq_q, tile.block_m) * size.heads_q * size.batch,), query.device, tile,
            q, k, v, kp, vp, gate, output, logsumexp,
            mask.tensor, key_start, key_end, prefix_index, cu_seqlens_q, cu_seqlens_k,
            *(descriptor(tensor, tile.block_n, size.block_d) if whole_axis else None for tensor in (k, v)),
            strides(q), strides(k), strides(v), strides(kp), strides(vp), strides(output),
            *gate_strides(gate), *mask.strides, size.heads_q, size.group, *size.extents, log2_scale(scale),
            HEAD_DIM=size.head_dim, BLOCK_D=size.block_d, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
            BLOCK_P=size.block_p, PREFIX=size.prefix, CAUSAL=is_causal, MASK=mask.kind,
            ELEMENTWISE=attn_mask is not None or scale <= 0, TOKENS=size.tokens,
            ALIGNMENT=alignment(q, k, v, kp, vp, output),
        )  # fmt: skip

    default = (tile_for("forward", query.dtype, size.head_dim, query.device, size.tokens),)
    kind = kind_of("forward", query, size.seq_q, is_causal, size.tokens)
    launch(choose(kind, query.device, default, is_forced("forward"), launch))
    if not size.tokens:
        zero_tail(output, cu_seqlens_q)
    return finish(output, query), logsumexp


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
    size = Sizes(query, key_cache, prefix_key, prefix_index, None, 0, 0)
    q, k, v = (with_unit_stride(tensor) for tensor in (query, key_cache, value_cache))
    kp, vp = (None if tensor is None else with_unit_stride(tensor) for tensor in (prefix_key, prefix_value))
    output = empty_rows_like(query)
    tile = tile_for("decode", query.dtype, size.head_dim, query.device)
    # More rows than the smallest tile (several new tokens, large groups): a larger one, so that keys are read once.
    block_m = min(max(tile.block_m, block_of(size.group * size.seq_q)), 64)
    programs = blocks(size.group * size.seq_q, block_m) * size.heads_kv * size.batch
    splits = _splits(size, tile, programs, query.device)
    combine = splits > 1
    shape = (size.batch, size.heads_q, size.seq_q, splits) if combine else (0,)
    partial = torch.empty(*shape, size.head_dim, dtype=torch.float32, device=query.device)
    partial_logsumexp = torch.empty(shape, dtype=torch.float32, device=query.device)
    packed = alignment(q, k, v, kp, vp, output)
    prefix_arguments = (size.prefix_count, size.prefix_length, log2_scale(scale))
    run(
        decode_split_kernel, (programs * splits,), query.device, tile,
        q, k, v, kp, vp, gate, output, partial, partial_logsumexp, key_start, key_end, prefix_index,
        strides(q), strides(k), strides(v), strides(kp), strides(vp), strides(output), *gate_strides(gate),
        size.heads_kv, size.group, size.seq_q, size.seq_k, splits, *prefix_arguments,
        HEAD_DIM=size.head_dim, BLOCK_D=size.block_d, BLOCK_M=block_m, BLOCK_N=tile.block_n, BLOCK_P=size.block_p,
        PREFIX=size.prefix, CAUSAL=is_causal, ELEMENTWISE=scale <= 0, COMBINE=combine, ALIGNMENT=packed,
    )  # fmt: skip
    if combine:
        run(
            decode_combine_kernel, (size.batch * size.heads_q * size.seq_q,), query.device, _COMBINE_TILE,
            q, kp, vp, gate, output, partial, partial_logsumexp, prefix_index,
            strides(q), strides(kp), strides(vp), strides(output), *gate_strides(gate),
            size.heads_q, size.group, size.seq_q, splits, *prefix_arguments,
            HEAD_DIM=size.head_dim, BLOCK_D=size.block_d, BLOCK_S=block_of(splits, 2), BLOCK_P=min(size.block_p, 16),
            HAS_PREFIX=size.prefix_length > 0, ALIGNMENT=packed,
        )  # fmt: skip
    return finish(output, query)


# The parts of a row are combined in registers; more than this would not fit there.
_MOST_SPLITS = 32


def _splits(size: Sizes, tile: Tile, programs: int, device: torch.device) -> int:
    """Enough splits for two programs per processor, each with at least two blocks of the cache's capacity."""
    wanted = -(-2 * tuning.processors(device) // max(programs, 1))
    splits: int = max(1, min(wanted, size.seq_k // (2 * tile.block_n), _MOST_SPLITS))
    return splits
