"""What every launch needs: strides as the kernels want them, tiles, and the launch itself."""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llama_adapter_kernels.triton_kernels import tiles
from llama_adapter_kernels.triton_kernels.tuning import Tile

# Slots of one prefix tile. A longer prefix is swept tile by tile.
LARGEST_PREFIX_TILE = 64


def with_unit_stride(tensor: Tensor) -> Tensor:
    """The tensor itself when its last dimension is dense, else a copy (an expanded gradient, say)."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def strides(tensor: Tensor | None) -> tuple[int, int, int]:
    """(batch, head, row) strides in elements; packed [T, H, D] has batch stride 0.

    The stride of a dimension of size 1 is never used: as 0 it does not lead to another compilation.
    """
    if tensor is None:
        return 0, 0, 0
    used = [0 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    return (0, used[1], used[0]) if tensor.dim() == 3 else (used[0], used[1], used[2])


def alignment(*tensors: Tensor | None) -> int:
    """8 when every stride is a multiple of 8 elements, so that rows can be copied 16 bytes at a time; else 1."""
    return 1 if any(stride % 8 for tensor in tensors for stride in strides(tensor)) else 8


def gate_strides(gate: Tensor | None) -> tuple[int, int]:
    """(prefix, head) strides of a gate that is a scalar, [Hq] or [A, Hq]; 0 where it is broadcast."""
    if gate is None or gate.dim() == 0:
        return 0, 0
    used = [0 if size == 1 else stride for size, stride in zip(gate.shape, gate.stride(), strict=True)]
    return (0, used[0]) if gate.dim() == 1 else (used[0], used[1])


def block_of(size: int, smallest: int = 16) -> int:
    """The next power of two, at least what a matrix instruction takes."""
    return max(smallest, 1 << max(size - 1, 0).bit_length())


def log2_scale(scale: float) -> float:
    return scale * math.log2(math.e)


@dataclass(frozen=True)
class Mask:
    """attn_mask as the kernels take it."""

    tensor: Tensor | None
    strides: tuple[int, int, int, int]
    kind: int


def mask_view(attn_mask: Tensor | None) -> Mask:
    if attn_mask is None:
        return Mask(None, (0, 0, 0, 0), tiles.MASK_NONE.value)
    used = tuple(0 if size == 1 else stride for size, stride in zip(attn_mask.shape, attn_mask.stride(), strict=True))
    if attn_mask.dtype == torch.bool:
        return Mask(attn_mask.view(torch.uint8), used, tiles.MASK_BOOL.value)  # type: ignore[arg-type]
    return Mask(attn_mask, used, tiles.MASK_FLOAT.value)  # type: ignore[arg-type]


def run(
    kernel: Any, programs: Sequence[int], device: torch.device, tile: Tile, *arguments: Any, **constants: Any
) -> None:
    """Launches `programs` programs on the tensors' device (which need not be the current one).

    Contraction to fused multiply-add is asked for by name: Triton is changing its default.
    """
    if 0 in programs:
        return
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[tuple(programs)](
            *arguments, **constants, num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True
        )


def empty_rows_like(tensor: Tensor) -> Tensor:
    """An uninitialised tensor laid out like `tensor`, except that its last dimension is dense (see `finish`)."""
    result = torch.empty_like(tensor)
    return (
        result
        if result.stride(-1) == 1 or result.shape[-1] == 1
        else torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    )


def finish(result: Tensor, like: Tensor) -> Tensor:
    """`result` in the strides of `torch.empty_like(like)`: what the op's fake promised to the compiler."""
    promised = torch.empty_like(like)
    return result if promised.stride() == result.stride() else promised.copy_(result)
