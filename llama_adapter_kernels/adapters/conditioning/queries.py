"""The conditioning of LLaMA-Adapter V2 multimodal: learned queries that read all tokens of a vision encoder."""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


class QueryPrompt(nn.Module):
    """Tokens -> Linear, LayerNorm; learned queries before them; pre-norm blocks; the queries out -> Linear, LayerNorm.

    forward: features [B, T, width] -> prompts [B, P, hidden].

    With width 768 and the published sizes (inner 768, 8 blocks of 16 heads, P = 10) the parameters are those of the
    official multimodal checkpoint.
    """

    def __init__(
        self, width: int, hidden_size: int, prefix_length: int, inner_size: int = 768, blocks: int = 8, heads: int = 16
    ) -> None:
        super().__init__()
        self.input_projection = nn.Linear(width, inner_size)
        self.input_norm = nn.LayerNorm(inner_size)
        self.queries = nn.Parameter(torch.randn(prefix_length, inner_size))
        self.blocks = nn.ModuleList(Block(inner_size, heads) for _ in range(blocks))
        self.output_projection = nn.Linear(inner_size, hidden_size)
        self.output_norm = nn.LayerNorm(hidden_size)

    def forward(self, features: Tensor) -> Tensor:
        tokens = self.input_norm(self.input_projection(features))
        states = torch.cat([self.queries.to(tokens.dtype).expand(tokens.shape[0], -1, -1), tokens], dim=1)
        for block in self.blocks:
            states = block(states)
        return cast(Tensor, self.output_norm(self.output_projection(states[:, : self.queries.shape[0]])))


class Block(nn.Module):
    """A pre-norm transformer block of a ViT: attention without a mask, an MLP of four times the width, exact GELU."""

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(size)
        self.qkv = nn.Linear(size, 3 * size)
        self.proj = nn.Linear(size, size)
        self.norm2 = nn.LayerNorm(size)
        self.fc1 = nn.Linear(size, 4 * size)
        self.fc2 = nn.Linear(4 * size, size)

    def forward(self, states: Tensor) -> Tensor:
        batch, length, size = states.shape
        qkv = self.qkv(self.norm1(states)).view(batch, length, 3, self.heads, size // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(batch, length, size)
        states = states + self.proj(mixed)
        return cast(Tensor, states + self.fc2(nn.functional.gelu(self.fc1(self.norm2(states)))))
