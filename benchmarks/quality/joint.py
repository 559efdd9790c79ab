"""Prompts without a gate: their keys and values stand before the words' in one softmax, as in prefix tuning.

This is what zero-init attention is compared with. It works in every model of transformers whose attention goes through its
attention interface, encoders included.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "joint_prefix"


class ProjectedPrompt(nn.Module):
    """A prompt [P, hidden] from N(0, 1) that becomes keys and values by the layer's own frozen projections, as in
    LLaMA-Adapter; positions do not enter."""

    def __init__(self, length: int, attention: nn.Module, hidden: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.prompt = nn.Parameter(torch.randn(length, hidden, device=attention.k_proj.weight.device))

    def forward(self, attention: nn.Module) -> tuple[Tensor, Tensor]:
        """(key, value), each [1, heads, P, head_dim]."""
        key, value = (
            project(self.prompt)[None].unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for project in (attention.k_proj, attention.v_proj)
        )
        return key, value


class KeysAndValues(nn.Module):
    """Keys and values [heads, P, head_dim] that are learned as they are: prefix tuning."""

    def __init__(self, length: int, attention: nn.Module, heads: int, head_dim: int) -> None:
        super().__init__()
        weight = next(attention.parameters())
        self.key = nn.Parameter(torch.randn(heads, length, head_dim, device=weight.device))
        self.value = nn.Parameter(torch.randn(heads, length, head_dim, device=weight.device))

    def forward(self, attention: nn.Module) -> tuple[Tensor, Tensor]:
        """(key, value), each [1, heads, P, head_dim]."""
        return self.key[None], self.value[None]


def attach(model: Any, prefixes: dict[nn.Module, nn.Module]) -> None:
    """Freezes the model and puts a prefix before the words of each of the attention modules."""
    model.requires_grad_(False)
    for attention, prefix in prefixes.items():
        setattr(attention, NAME, prefix)
    model.set_attn_implementation(NAME)


def joint_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attention of transformers' interface over prefix and words; query, key, value [B, H, S, D]."""
    prefix = getattr(module, NAME, None)
    if prefix is not None:
        found = (part.to(key.dtype).expand(len(key), -1, -1, -1) for part in prefix(module))
        prefix_key, prefix_value = found
        key, value = torch.cat([prefix_key, key], 2), torch.cat([prefix_value, value], 2)
        if attention_mask is not None:
            seen = True if attention_mask.dtype == torch.bool else 0.0
            attention_mask = nn.functional.pad(attention_mask, (prefix_key.shape[2], 0), value=seen)
    options.pop("is_causal", None)
    return sdpa_attention_forward(module, query, key, value, attention_mask, is_causal=False, **options)


def _whole_mask(*arguments: Any, **options: Any) -> Tensor | None:
    """The mask even where causal attention could do without."""
    return sdpa_mask(*arguments, **(options | {"allow_is_causal_skip": False}))


AttentionInterface.register(NAME, joint_attention)
AttentionMaskInterface.register(NAME, _whole_mask)
