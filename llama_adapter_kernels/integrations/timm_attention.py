"""timm's attention module through this package's attention function."""

from typing import Any

from timm.layers import Attention
from torch import Tensor

from llama_adapter_kernels.integrations.transformers.attention import attention


class HookedTimmAttention(Attention):
    """timm's Attention, other than that it computes attention here."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, **kwargs: Any) -> Tensor:
        """x [B, N, C] to [B, N, C], arguments as those of timm's Attention.

        Raises:
            ValueError: the module is not of timm's own class, but of one derived from it.
        """
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        query, key = self.q_norm(query), self.k_norm(key)
        dropout = self.attn_drop.p if self.training else 0.0
        output, _ = attention(self, query, key, value, attn_mask, dropout, self.scale, is_causal, **kwargs)
        output = self.norm(output.flatten(2))
        if self.gate is not None:
            output = output * self.gate(x).sigmoid()
        projected: Tensor = self.proj_drop(self.proj(output))
        return projected
