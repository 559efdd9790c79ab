"""Compact masks say exactly what transformers' own bool mask says, wherever a query token is real."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache, MistralConfig, StaticCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from llama_adapter_kernels.integrations.transformers import connect  # noqa: F401  (registers the mask function)
from llama_adapter_kernels.integrations.transformers.masks import CompactMask, Packed, Window

HEADS, WIDTH = 2, 4


def config(implementation: str, sliding_window: int | None = None) -> MistralConfig:
    made = MistralConfig(
        hidden_size=8, num_attention_heads=HEADS, num_key_value_heads=HEADS, head_dim=WIDTH, num_hidden_layers=1,
        sliding_window=sliding_window,
    )  # fmt: skip
    made._attn_implementation = implementation
    return made


def cache(kind: str, batch: int, past: int, sliding_window: int | None, room: int) -> object | None:
    """A cache with `past` tokens in it."""
    if kind == "none":
        return None
    if kind == "static":
        made = StaticCache(config("eager", sliding_window), max_cache_len=room)
    elif kind == "dynamic":
        made = DynamicCache(config=config("eager", sliding_window))
    else:  # keeps every token, whatever the model's window is
        made = DynamicCache()
    if past:
        made.update(*torch.zeros(2, batch, HEADS, past, WIDTH), 0)
    return made


def both(
    batch: int, length: int, kind: str = "none", past: int = 0, padding: Tensor | None = None,
    position_ids: Tensor | None = None, window: int | None = None, room: int = 24,
) -> tuple[Tensor | CompactMask | None, Tensor]:  # fmt: skip
    """(the compact mask, transformers' mask [B, 1, Sq, Sk] as bool) of the same forward pass."""
    masks = []
    for implementation in ("zero_gate", "eager"):
        create = create_causal_mask if window is None else create_sliding_window_causal_mask
        masks.append(
            create(
                config(implementation, window), torch.zeros(batch, length, 8), padding,
                cache(kind, batch, past, window, room), position_ids,
            )
        )  # fmt: skip
    return masks[0], masks[1] == 0


def expand(mask: Tensor | CompactMask | None, like: Tensor) -> Tensor:
    """What the operation computes from a compact mask, as a bool mask. `like`: bool [B, 1, Sq, Sk]."""
    batch, _, length, keys = like.shape
    queries, places = torch.arange(length)[:, None], torch.arange(keys)[None]
    if mask is None:
        return (places <= queries + keys - length).expand(batch, 1, -1, -1)
    if isinstance(mask, Window):
        start, end = (x.view(batch, 1, 1, 1) for x in (mask.start, mask.end))
        inside = (places >= start) & (places < end)
        return inside & (places <= queries + end - length) if mask.causal else inside.expand(batch, 1, length, keys)
    if isinstance(mask, Packed):
        number = torch.bucketize(torch.arange(batch * length), mask.offsets, right=True).view(batch, length)
        assert mask.longest == mask.offsets.diff().max()
        return ((number[:, :, None] == number[:, None]) & (places <= queries))[:, None]
    return mask.expand(batch, 1, length, keys)


def assert_same(compact: Tensor | CompactMask | None, expected: Tensor, padding: Tensor | None = None) -> None:
    """Rows of padding tokens are the caller's to ignore."""
    real = torch.ones(expected.shape[:3], dtype=torch.bool)
    if padding is not None:
        real = padding[:, None, -expected.shape[2] :].bool()
    assert torch.equal(expand(compact, expected)[real], expected[real])


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_every_mask_equals_transformers(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["none", "dynamic", "full", "static"]), label="cache")
    batch, length = data.draw(st.integers(1, 3), label="batch"), data.draw(st.integers(1, 6), label="length")
    past = 0 if kind == "none" else data.draw(st.integers(0, 9), label="past")
    window = data.draw(st.sampled_from([None, 2, 4, 7, 40]), label="window")
    padding = None
    if data.draw(st.booleans(), label="padded"):
        rows = data.draw(
            st.lists(st.lists(st.booleans(), min_size=past + length, max_size=past + length), min_size=batch,
                     max_size=batch), label="padding"
        )  # fmt: skip
        side = data.draw(st.sampled_from(["left", "right", "any"]), label="side")
        padding = torch.tensor(rows).long()
        if side != "any":  # sorted: all padding on one side
            padding = padding.sort(-1, descending=side == "right").values
    compact, expected = both(batch, length, kind, past, padding, window=window)
    assert_same(compact, expected, padding)


@given(lengths=st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4), min_size=1, max_size=3), data=st.data())
@settings(max_examples=100, deadline=None)
def test_packed_sequences_found_in_position_ids(lengths: list[list[int]], data: st.DataObject) -> None:
    width = max(map(sum, lengths))
    for row in lengths:
        if sum(row) < width:
            row.append(width - sum(row))
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    window = data.draw(st.sampled_from([None, 2, 4]))
    compact, expected = both(len(lengths), width, position_ids=positions, window=window)
    assert_same(compact, expected)
    if window is None and any(len(row) > 1 for row in lengths):
        assert isinstance(compact, Packed)
        assert compact.offsets.diff().tolist() == [n for row in lengths for n in row]


ONES = torch.ones(2, 6, dtype=torch.long)
LEFT = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
HOLE = torch.tensor([[1, 1, 0, 1, 1, 1], [1] * 6])


@pytest.mark.parametrize(
    ("arguments", "form"),
    [
        ({}, None),
        ({"padding": ONES}, None),
        ({"padding": LEFT}, Window),
        ({"padding": LEFT.flip(1)}, None),  # training: causality hides padding on the right
        ({"padding": HOLE}, Tensor),
        ({"kind": "dynamic", "past": 5, "length": 1, "padding": ONES}, None),
        ({"kind": "dynamic", "past": 5, "length": 1, "padding": LEFT}, Window),
        ({"kind": "dynamic", "past": 5, "length": 1, "padding": LEFT.flip(1)}, Tensor),
        ({"kind": "dynamic", "past": 2, "length": 4}, None),
        ({"kind": "static", "past": 0, "length": 6, "padding": LEFT}, Window),
        ({"kind": "static", "past": 5, "length": 1, "padding": LEFT}, Window),
        ({"kind": "static", "past": 5, "length": 1}, Window),
        ({"window": 9}, None),
        ({"window": 3}, Tensor),
        ({"window": 3, "kind": "dynamic", "past": 5, "length": 1}, None),
        ({"window": 3, "kind": "full", "past": 5, "length": 1}, Window),
    ],
)
def test_which_form_a_mask_takes(arguments: dict, form: type | None) -> None:
    """The fast forms are taken where they can be: nothing here may fall back to a mask over pairs of tokens."""
    compact, _ = both(**{"batch": 2, "length": 6} | arguments)
    assert compact is None if form is None else isinstance(compact, form)
