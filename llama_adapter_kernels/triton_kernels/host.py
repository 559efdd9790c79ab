"""What every launch needs: sizes and strides as the kernels want them, descriptors, and the launch itself."""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llama_adapter_kernels.triton_kernels import prefix, scores, tuning
from llama_adapter_kernels.triton_kernels.tuning import Tile
from llama_adapter_kernels.triton_kernels.zero_tail import zero_tail_kernel

# Slots of one prefix tile. A longer prefix is swept tile by tile.
LARGEST_PREFIX_TILE = 64


class Sizes:
    """Sizes of a padded ([B, H, S, D]) or packed ([T, H, D] with cu_seqlens) problem, and how it is cut.

    tokens: the packed axis counts as one sequence of `total_q` queries (see problem.py); then `batch` is 1.
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        prefix_key: Tensor | None,
        prefix_index: Tensor | None,
        cu_seqlens_q: Tensor | None,
        longest_q: int,
        longest_k: int,
    ) -> None:
        self.head_dim = query.shape[-1]
        self.block_d = block_of(self.head_dim)
        self.heads_q, self.heads_kv = query.shape[1], key.shape[1]
        self.group = self.heads_q // self.heads_kv
        self.prefix_count: int = 0 if prefix_key is None else prefix_key.shape[0]
        self.prefix_length: int = 0 if prefix_key is None else prefix_key.shape[2]
        self.prefix, self.block_p = prefix_kind(self.prefix_length)
        if cu_seqlens_q is None:
            self.batch = self.sequences = query.shape[0]
            self.seq_q, self.seq_k = query.shape[2], key.shape[2]
            self.total_q, self.total_k = self.seq_q, self.seq_k
            self.tokens = False
        else:
            self.sequences = cu_seqlens_q.shape[0] - 1
            self.total_q, self.total_k = query.shape[0], key.shape[0]
            shared = prefix_index is None and self.prefix_count <= 1
            self.tokens = shared and self.sequences > 0
            if self.tokens:
                self.batch, self.seq_q, self.seq_k = 1, self.total_q, self.total_k
            else:
                self.batch = self.sequences
                self.seq_q, self.seq_k = min(longest_q, self.total_q), min(longest_k, self.total_k)
        self.search_steps = max(self.sequences - 1, 0).bit_length()

    @property
    def extents(self) -> tuple[int, ...]:
        """seq_q to prefix_length in the order of the kernels' arguments."""
        return (self.seq_q, self.seq_k, self.total_q, self.total_k, self.sequences, self.search_steps,
                self.prefix_count, self.prefix_length)  # fmt: skip


def prefix_kind(prefix_length: int) -> tuple[int, int]:
    """(how the kernels treat a prefix of this length, slots of a tile)."""
    if prefix_length == 0:
        return prefix.PREFIX_NONE.value, 16
    block = min(block_of(prefix_length), LARGEST_PREFIX_TILE)
    return (prefix.PREFIX_ONE_TILE if prefix_length <= block else prefix.PREFIX_LOOP).value, block


def blocks(size: int, block: int) -> int:
    return -(-size // block)


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


def descriptor(tensor: Tensor, block_rows: int, block_d: int) -> Any:
    """A tensor descriptor of [B, H, S, D] (packed: [1, H, T, D]) in blocks of rows; None where the device has no engine
    for it (before compute capability 9.0), elements have 4 bytes, or addresses are not multiples of 16 bytes."""
    if not tuning.has_descriptors(tensor.device) or tensor.element_size() != 2 or 0 in tensor.shape:
        return None
    from triton.tools.tensor_descriptor import TensorDescriptor

    view = tensor.transpose(0, 1)[None] if tensor.dim() == 3 else tensor
    # The stride of a dimension of size 1 is never used, but has to be a legal one.
    steps = [
        view.shape[-1] if size == 1 else stride for size, stride in zip(view.shape[:3], view.stride(), strict=False)
    ]
    if tensor.data_ptr() % 16 or any(step <= 0 or step % 8 for step in steps):
        return None
    return TensorDescriptor(tensor, list(view.shape), [*steps, 1], [1, 1, block_rows, block_d])


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
        return Mask(None, (0, 0, 0, 0), scores.MASK_NONE.value)
    used = tuple(0 if size == 1 else stride for size, stride in zip(attn_mask.shape, attn_mask.stride(), strict=True))
    if attn_mask.dtype == torch.bool:
        return Mask(attn_mask.view(torch.uint8), used, scores.MASK_BOOL.value)  # type: ignore[arg-type]
    return Mask(attn_mask, used, scores.MASK_FLOAT.value)  # type: ignore[arg-type]


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


_TAIL_TILE = Tile(64, 0, 4, 1)


def zero_tail(tensor: Tensor | None, cu_seqlens: Tensor | None) -> None:
    """Packed tensors: rows after the last sequence become zero, so that a gradient never holds what memory held."""
    if tensor is None or cu_seqlens is None:
        return
    total, heads, head_dim = tensor.shape
    run(
        zero_tail_kernel, (blocks(total, _TAIL_TILE.block_m),), tensor.device, _TAIL_TILE,
        tensor, cu_seqlens, strides(tensor), total, cu_seqlens.shape[0] - 1, heads,
        HEAD_DIM=head_dim, BLOCK_D=block_of(head_dim), ROWS=_TAIL_TILE.block_m,
    )  # fmt: skip
