"""The conditionings of ImageBind-LLM and MU-LLaMA: one vector through residual SwiGLU blocks, published with P = 1."""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, silu

_EPSILON = 1e-6


class SwiGLUBlock(nn.Module):
    """x + f2(silu(f1(norm(x))) * f3(norm(x))), without biases, RMSNorm."""

    def __init__(self, size: int, inner_size: int) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.ones(size))
        self.f1 = nn.Linear(size, inner_size, bias=False)
        self.f2 = nn.Linear(inner_size, size, bias=False)
        self.f3 = nn.Linear(size, inner_size, bias=False)

    def forward(self, vector: Tensor) -> Tensor:
        normed = rms_norm(vector, vector.shape[-1:], self.norm.to(vector.dtype), _EPSILON)
        return cast(Tensor, vector + self.f2(silu(self.f1(normed)) * self.f3(normed)))


class PooledPrompt(nn.Module):
    """ImageBind-LLM: an embedding, projected and refined.

    forward: features [B, width] -> prompts [B, P, hidden], the same vector in all P slots.
    """

    def __init__(self, width: int, hidden_size: int, prefix_length: int, inner_size: int, blocks: int = 3) -> None:
        super().__init__()
        self.prefix_length = prefix_length
        self.projection = nn.Linear(width, hidden_size)
        self.blocks = nn.Sequential(*(SwiGLUBlock(hidden_size, inner_size) for _ in range(blocks)))

    def forward(self, features: Tensor) -> Tensor:
        vector = cast(Tensor, self.blocks(self.projection(features)))
        return vector[:, None].expand(-1, self.prefix_length, -1)


class LayerMeansPrompt(nn.Module):
    """MU-LLaMA: a learned mix of the encoder's layers (a convolution of kernel 1 over them), then as PooledPrompt.

    forward: features [B, depths, width], the mean over time of each hidden state -> prompts [B, P, hidden].
    """

    def __init__(
        self, width: int, depths: int, hidden_size: int, prefix_length: int, inner_size: int, blocks: int = 3
    ) -> None:
        super().__init__()
        self.mix = nn.Conv1d(depths, 1, 1)
        self.refine = PooledPrompt(width, hidden_size, prefix_length, inner_size, blocks)

    def forward(self, features: Tensor) -> Tensor:
        return cast(Tensor, self.refine(self.mix(features)[:, 0]))
