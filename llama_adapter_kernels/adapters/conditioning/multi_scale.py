"""The paper's conditioning (arXiv 2303.16199, section 3.3): global features of several depths, one projection."""

from typing import cast

from torch import Tensor, nn


class MultiScalePrompt(nn.Module):
    """Concatenates one global feature from each of `depths` layers and projects them to one vector for every slot.

    forward: features [B, depths, width] -> prompts [B, P, hidden], the same vector in all P slots.
    """

    def __init__(self, width: int, depths: int, hidden_size: int, prefix_length: int) -> None:
        super().__init__()
        self.prefix_length = prefix_length
        self.projection = nn.Linear(depths * width, hidden_size)

    def forward(self, features: Tensor) -> Tensor:
        vector = cast(Tensor, self.projection(features.flatten(1)))
        return vector[:, None].expand(-1, self.prefix_length, -1)
