"""Falcon's attention through transformers' attention interface, which its own code does not ask."""

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache
from transformers.models.falcon.modeling_falcon import FalconAttention, apply_rotary_pos_emb

from llama_adapter_kernels.integrations.transformers.attention import attention


class HookedFalconAttention(FalconAttention):
    """The same attention without repeating keys and values for the query heads of a group."""

    def forward(
        self,
        hidden_states: Tensor,
        alibi: Tensor | None,
        attention_mask: Any,
        position_ids: Tensor | None = None,
        layer_past: Cache | None = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """As FalconAttention.forward. Its projection holds, for every key head, its query heads, its key, its value."""
        groups = self.num_kv_heads
        fused = self.query_key_value(hidden_states)
        fused = fused.unflatten(-1, (groups, self.num_heads // groups + 2, self.head_dim))
        query = fused[..., :-2, :].flatten(2, 3).transpose(1, 2)
        key, value = fused[..., -2, :].transpose(1, 2), fused[..., -1, :].transpose(1, 2)
        assert position_embeddings is not None and alibi is None
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if layer_past is not None:
            key, value = layer_past.update(key, value, self.layer_idx)
        output, _ = attention(
            self, query, key, value, attention_mask, scaling=self.inv_norm_factor, output_attentions=output_attentions
        )
        return self.dense(output.flatten(2)), None
