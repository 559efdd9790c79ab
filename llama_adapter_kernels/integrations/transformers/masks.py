"""Masks for the attention hook in a form that the fused operation takes without reading a mask for every pair of tokens.

transformers asks the registered mask function once per forward pass and hands what it returns to every layer. It also
hands it back to itself during generation, where it lets 4-dimensional tensors and FlexAttention's BlockMask through. So a
compact mask is a BlockMask of a kind of its own. What the mask function returns is one of

    None                          causal, bottom-right aligned, nothing else; in a model that is not causal, no mask at all
    Window                        the keys [start, end) of each sequence, causal within or not
    Packed                        packed causal sequences
    bool or floating [batch, 1, Sq, Sk]                anything else, as for scaled_dot_product_attention
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    prepare_padding_mask,
    sdpa_mask,
)
from transformers.utils.import_utils import is_tracing


class CompactMask(BlockMask):
    """Only the type is FlexAttention's; nothing of it is used. It looks 4-dimensional to code that asks."""

    ndim = 4

    def contiguous(self) -> "CompactMask":
        """transformers asks for it before it hands a mask on."""
        return self


class Window(CompactMask):
    """The valid keys [start, end) of each sequence, both int32 [batch]; with causality the newest query sees the last."""

    def __init__(self, start: Tensor, end: Tensor, causal: bool) -> None:
        self.start, self.end, self.causal = start, end, causal

    @property
    def shape(self) -> tuple[int, ...]:
        return self.start.shape[0], 1, 1, 1

    def to(self, *args: Any, **kwargs: Any) -> "Window":
        """On another device: accelerate moves the arguments of every layer."""
        return Window(self.start.to(*args, **kwargs), self.end.to(*args, **kwargs), self.causal)


class Packed(CompactMask):
    """Offsets of packed causal sequences, int32 [sequences + 1], and an upper bound of their lengths.

    The rows of the batch lie one after the other.
    """

    def __init__(self, offsets: Tensor, longest: int) -> None:
        self.offsets, self.longest = offsets, longest

    @property
    def shape(self) -> tuple[int, ...]:
        return 1, 1, self.offsets.shape[0], self.longest

    def to(self, *args: Any, **kwargs: Any) -> "Packed":
        """On another device."""
        return Packed(self.offsets.to(*args, **kwargs), self.longest)


def zero_gate_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Tensor] = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | CompactMask | None:
    """The mask function registered with transformers; arguments as those of its `sdpa_mask`, which makes the bool masks.

    While anything traces (torch.compile, export, jit.trace, a CUDA graph), nothing is read that would decide about the form:
    padding and packed sequences give a bool mask then, as they do for the base model.
    """

    def dense() -> Tensor:
        mask: Tensor = sdpa_mask(
            batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, local_size,
            allow_is_causal_skip=False, allow_is_bidirectional_skip=False, use_vmap=use_vmap, device=device,
        )  # fmt: skip
        return mask

    tracing = is_tracing(attention_mask)
    if mask_function is bidirectional_mask_function and not (use_vmap or tracing):
        return _bidirectional(batch_size, q_length, kv_length, kv_offset, attention_mask, local_size, device, dense)
    # transformers clears allow_is_causal_skip for whatever is more than causality and a sliding window, and for steps
    # against a static cache.
    if use_vmap or not (mask_function is causal_mask_function or (allow_is_causal_skip and local_size is not None)):
        square = (
            q_length == kv_length and attention_mask is None and isinstance(q_offset, int) and q_offset == kv_offset
        )
        packed = not (use_vmap or tracing or allow_is_causal_skip or allow_is_bidirectional_skip) and square
        offsets = _packed_offsets(mask_function, batch_size, q_length, local_size, device) if packed else None
        return dense() if offsets is None else offsets
    end = q_offset + q_length - kv_offset  # an int, or a tensor from a static cache
    start: int | Tensor = 0
    if local_size is not None and kv_length > local_size:
        if q_length > 1 and not (isinstance(q_offset, int) and q_offset + q_length <= local_size):
            return dense()
        start = (end - local_size).clamp(min=0) if isinstance(end, Tensor) else max(end - local_size, 0)
    padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if padding is not None:
        if tracing:
            return dense()
        first = _first_keys(padding[:, kv_offset : kv_offset + kv_length], end, q_length)
        if first is None:
            return dense()
        if isinstance(first, Tensor):
            start = first.clamp(min=start)
    if isinstance(start, int) and start == 0 and isinstance(end, int) and end == kv_length:
        return None
    return _window(start, end, batch_size, device, causal=True)


def _window(
    start: int | Tensor, end: int | Tensor, batch_size: int, device: torch.device | str, causal: bool
) -> Window:
    bounds = torch.empty(2, batch_size, dtype=torch.int32, device=device)
    bounds[0] = start
    bounds[1] = end
    return Window(bounds[0], bounds[1], causal)


def _bidirectional(
    batch_size: int, q_length: int, kv_length: int, kv_offset: int, attention_mask: Tensor | None,
    local_size: int | None, device: torch.device | str, dense: Callable[[], Tensor],
) -> Tensor | CompactMask | None:  # fmt: skip
    """Every token sees every token that is not padding."""
    if local_size is not None and local_size < kv_length:
        return dense()
    padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if padding is None:
        return None
    padding = padding[:, kv_offset : kv_offset + kv_length]
    if padding.all():
        return None
    count = padding.sum(-1)
    first = padding.int().argmax(-1)
    last = torch.where(padding, torch.arange(padding.shape[1], device=padding.device), -1).amax(-1) + 1
    if not ((last - first == count) | (count == 0)).all():
        return dense()
    return _window(torch.where(count == 0, 0, first), last.clamp(min=0), batch_size, device, causal=False)


def _first_keys(padding: Tensor, end: int | Tensor, q_length: int) -> Tensor | int | None:
    """The first valid key of each sequence: 0 where nothing is padded on the left, or a tensor [batch].

    None where the valid keys of `padding` [batch, keys] are not one stretch that ends with the newest query, so that a
    window cannot say it. Padding on the right of a batch without a cache needs no window: causality hides it.
    """
    if isinstance(end, int):
        padding = padding[:, :end]
        if padding.all():
            return 0
    count = padding.sum(-1)
    positions = torch.arange(padding.shape[1], device=padding.device)
    nothing = count == 0
    last = torch.where(padding, positions, -1).amax(-1) + 1
    stop = last if isinstance(end, int) and end == q_length else torch.zeros_like(last) + end
    first = torch.where(nothing, stop, padding.int().argmax(-1))
    if not ((count == stop - first) & ((last == stop) | nothing)).all():
        return None
    # Sequences without any key keep an empty window.
    first = torch.where(nothing, padding.shape[1] if isinstance(end, int) else end, first)
    return first if first.any() else 0


def _packed_offsets(
    mask_function: Callable[..., Tensor], batch_size: int, length: int, local_size: int | None, device: Any
) -> Packed | None:
    """The compact mask of the sequences that transformers found in position_ids, from its mask function.

    Rows of the batch are laid one after the other. None where the mask is not that of packed causal sequences.
    """
    if not mask_function.__qualname__.startswith("and_masks"):
        return None
    rows, tokens = torch.arange(batch_size, device=device)[:, None], torch.arange(length, device=device)[None]
    if bool(mask_function(rows, 0, tokens[:, :-1], tokens[:, 1:]).any()):
        return None  # not causal
    # A sequence begins where a token does not see the one before it. Token 0 is compared with itself.
    begins = ~mask_function(rows, 0, tokens, (tokens - 1).clamp(min=0))
    begins[:, 0] = True
    starts = begins.flatten().nonzero()[:, 0]
    offsets = torch.nn.functional.pad(starts, (0, 1), value=batch_size * length).to(torch.int32)
    longest = int(offsets.diff().max())
    if local_size is not None and longest > local_size:
        return None
    return Packed(offsets, longest)
