"""The parameters of one adapted layer, and the prefix that they become.

Source: arXiv 2303.16199. A layer's prompt [P, hidden] goes through the layer's own key and value projection and becomes
the prefix of its attention; the gate, zero at first, decides how much of it is added.
"""

from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import Tensor, nn

from llama_adapter_kernels.adapters.config import AdapterConfig
from llama_adapter_kernels.adapters.prefix_cache import Prefix, PrefixCache, inference_settings
from llama_adapter_kernels.ops.registration import accumulator_dtype


class AdapterLayer(nn.Module):
    """Prompt [P, hidden] and gate ([heads] or [1]) of one layer, float32 whatever the model's dtype is."""

    def __init__(self, config: AdapterConfig, hidden_size: int, num_heads: int, device: torch.device) -> None:
        super().__init__()
        gates = num_heads if config.gate_shape == "head" else 1
        self.num_heads = num_heads
        self.prompt = nn.Parameter(torch.randn(config.prefix_length, hidden_size, device=device, dtype=torch.float32))
        self.gate = nn.Parameter(torch.zeros(gates, device=device, dtype=torch.float32))
        self.activation = config.gate
        self._cache = PrefixCache()

    def effective_gate(self) -> Tensor:
        """What multiplies the prefix branch: tanh(gate) or gate, [heads] or [1], float32."""
        return torch.tanh(self.gate) if self.activation == "tanh" else self.gate

    def prefix(
        self,
        project: Callable[[Tensor], tuple[Tensor, Tensor]],
        sources: Callable[[], Sequence[Tensor] | None],
        query: Tensor,
    ) -> Prefix:
        """(prefix_key, prefix_value [1, Hkv, P, D], gate [1, Hq]) of this layer, for attention with `query`.

        Args:
            project: from the prompt, in query's dtype, to prefix_key and prefix_value.
            sources: the tensors behind `project`; None if more than tensors decides about its results.
            query: [B, Hq, Sq, D].

        In evaluation without gradients the prefix is computed once, and again after any change of the prompt, the gate
        or `sources()`. Otherwise nothing is kept, so nothing stale can be trained on.
        """
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            if not torch.compiler.is_compiling():
                self._cache.clear()
            return self._compute(project, query.dtype)
        weights = sources()
        if weights is None:
            return self._compute(project, query.dtype)
        watched, settings = (*self._parameters.values(), *weights), inference_settings(query)
        prefix = self._cache.get(watched, settings)
        if prefix is None:
            prefix = self._compute(project, query.dtype)
            self._cache.keep(watched, settings, prefix)
        return prefix

    def _compute(self, project: Callable[[Tensor], tuple[Tensor, Tensor]], dtype: torch.dtype) -> Prefix:
        gate = self.effective_gate().to(accumulator_dtype(dtype)).expand(1, self.num_heads)
        return (*project(self.prompt.to(dtype)), gate)

    def train(self, mode: bool = True) -> Self:
        self._cache.clear()
        super().train(mode)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """model.half(), .to(...): the layer moves along but stays float32, as small gradients on top of N(0, 1) need."""
        self._cache.clear()

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.dtype in (torch.float16, torch.bfloat16) else moved

        super()._apply(move, recurse)
        return self
