"""The parameters of one adapted layer.

Source: arXiv 2303.16199. A layer's prompt [P, hidden] goes through the layer's own key and value projection and becomes
the prefix of its attention; the gate, zero at first, decides how much of it is added.
"""

import torch
from torch import Tensor, nn

from llama_adapter_kernels.adapters.config import AdapterConfig
from llama_adapter_kernels.adapters.precision import KeepsFloat32


class AdapterLayer(KeepsFloat32):
    """Prompt [P, hidden] and gate ([heads] or [1]) of one layer, float32 whatever the model's dtype is.

    The parameters are read in `forward` only: that is where tools which keep them elsewhere (offloading, sharding) bring
    them back.
    """

    def __init__(self, config: AdapterConfig, hidden_size: int, num_heads: int, device: torch.device) -> None:
        super().__init__()
        gates = num_heads if config.gate_shape == "head" else 1
        self.prefix_length, self.num_heads = config.prefix_length, num_heads
        self.prompt = nn.Parameter(torch.randn(config.prefix_length, hidden_size, device=device, dtype=torch.float32))
        self.gate = nn.Parameter(torch.zeros(gates, device=device, dtype=torch.float32))
        self.activation, self.rows = config.gate, config.prefix_rows
        self.prompts_by = "tuned" if config.tuning is None else config.tuning.prompts
        new_gate = config.tuning is not None and config.tuning.new_gate
        self.new_gate = nn.Parameter(torch.ones(1, device=device, dtype=torch.float32)) if new_gate else None

    def forward(self, conditions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(prompts [N, P, hidden], gate [1, heads]), both float32, the gate as it multiplies.

        Args:
            conditions: [N, P, hidden], added to the prompt of each of N sequences; None: N is 1.
        """
        prompts = self.prompt[None] if conditions is None else self.prompt + conditions.to(self.prompt.dtype)
        return prompts, self.effective_gate().expand(1, self.num_heads)

    def effective_gate(self) -> Tensor:
        """What multiplies the prefix branch: tanh(gate) or gate, times the new gate, [heads] or [1], float32."""
        gate = torch.tanh(self.gate) if self.activation == "tanh" else self.gate
        return gate if self.new_gate is None else gate * self.new_gate
