"""Attention with dropout on its probabilities, which the fused operation never has as a tensor."""

import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from llama_adapter_kernels.integrations.transformers.masks import Window


def words_with_dropout(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | Window | None, dropout: float, scale: float | None,
    causal: bool,
) -> Tensor:  # fmt: skip
    """softmax(scale Q K^T) V with dropout, by PyTorch's scaled_dot_product_attention: [B, Hq, Sq, D].

    The prefix branch is added to it without dropout, by a call of the fused operation that has no words.
    """
    _say_once()
    if isinstance(mask, Window):
        mask, causal = dense(mask, query, key), False
    causal = causal and mask is None and query.shape[2] > 1
    grouped = query.shape[1] != key.shape[1]
    attend: Any = nn.functional.scaled_dot_product_attention
    output: Tensor = attend(query, key, value, mask, dropout, causal, scale=scale, enable_gqa=grouped)
    return output


def dense(mask: Window, query: Tensor, key: Tensor) -> Tensor:
    """A window as bool [B, 1, Sq, Sk]."""
    batch, length, keys = query.shape[0], query.shape[2], key.shape[2]
    rows = torch.arange(length, device=query.device)[:, None]
    columns = torch.arange(keys, device=query.device)[None]
    start, end = mask.start.view(batch, 1, 1, 1), mask.end.view(batch, 1, 1, 1)
    inside = (columns >= start) & (columns < end)
    return inside & (columns <= rows + end - length) if mask.causal else inside.expand(batch, 1, length, keys)


@cache
def _say_once() -> None:
    warnings.warn(
        "attention dropout: computed by scaled_dot_product_attention, slower than the fused operation; a model loaded with "
        "attention_dropout=0 (attention_probs_dropout_prob=0 for BERT and its like, attn_pdrop=0 for GPT-2) is faster",
        stacklevel=2,
    )
