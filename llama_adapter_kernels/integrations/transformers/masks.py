"""Masks for the attention hook in a form that the fused operation takes without reading a mask for every pair of tokens.

transformers asks the registered mask function once per forward pass and hands what it returns to every layer. It also
hands it back to itself during generation, where it lets 4-dimensional tensors through. So a compact mask is one:

    None                                     causal, bottom-right aligned, nothing else
    int32 [2, 1, 1, batch]                   key_start and key_end of each sequence, causal within
    int32 [1, 1, sequences + 1, longest]     offsets of packed sequences, the same in every column (a view)
    bool or floating [batch, 1, Sq, Sk]      anything else, as for scaled_dot_product_attention
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function, prepare_padding_mask, sdpa_mask


class Window(NamedTuple):
    """The valid keys [start, end) of each sequence, both int32 [batch]."""

    start: Tensor
    end: Tensor


class Packed(NamedTuple):
    """Offsets of the packed sequences, int32 [sequences + 1], and an upper bound of their lengths."""

    offsets: Tensor
    longest: int


def read_mask(mask: Tensor | None) -> Window | Packed | Tensor | None:
    """What a mask says; bool and floating masks are returned as they are."""
    if mask is None or mask.dtype != torch.int32:
        return mask
    if mask.shape[0] == 2:
        return Window(mask[0, 0, 0], mask[1, 0, 0])
    return Packed(mask[0, 0, :, 0], mask.shape[3])


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
) -> Tensor | None:
    """The mask function registered with transformers; arguments as those of its `sdpa_mask`, which makes the bool masks.

    While torch.compile traces, nothing is read that would decide about the form: padding and packed sequences give a
    bool mask then, as they do for the base model.
    """

    def dense() -> Tensor:
        mask: Tensor = sdpa_mask(
            batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, local_size,
            allow_is_causal_skip=False, allow_is_bidirectional_skip=False, use_vmap=use_vmap, device=device,
        )  # fmt: skip
        return mask

    tracing = torch.compiler.is_compiling()
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
    window = torch.empty(2, 1, 1, batch_size, dtype=torch.int32, device=device)
    window[0, 0, 0] = start
    window[1, 0, 0] = end
    return window


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
) -> Tensor | None:
    """The compact mask of the sequences that transformers found in position_ids, from its mask function.

    Rows of the batch are laid one after the other. None where the mask is not that of packed causal sequences.
    """
    if not mask_function.__qualname__.startswith("and_masks"):
        return None
    rows, tokens = torch.arange(batch_size, device=device)[:, None], torch.arange(length, device=device)[None]
    # A sequence begins where a token does not see the one before it. Token 0 is compared with itself.
    begins = ~mask_function(rows, 0, tokens, (tokens - 1).clamp(min=0))
    begins[:, 0] = True
    starts = begins.flatten().nonzero()[:, 0]
    offsets = torch.nn.functional.pad(starts, (0, 1), value=batch_size * length).to(torch.int32)
    longest = int(offsets.diff().max())
    if local_size is not None and longest > local_size:
        return None
    return offsets[None, None, :, None].expand(1, 1, -1, longest)
