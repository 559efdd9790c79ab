"""An adapter outside of any model: what file formats read and write, and what a model's adapter is made from."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from llama_adapter_kernels.adapters.config import AdapterConfig


@dataclass(frozen=True)
class AdapterState:
    """Everything that a saved adapter holds.

    Args:
        config: see AdapterConfig.
        base: facts of the model that the adapter belongs to: model_type, hidden_size, num_hidden_layers,
            num_attention_heads, num_key_value_heads, head_dim. A format that does not record a fact leaves it out.
        tensors: by name, on the CPU, float32: `layers.<number>.prompt` [P, hidden], `layers.<number>.gate` [heads] or [1],
            with a new gate `layers.<number>.new_gate` [1]; tuned parts by the modules' names in transformers without
            `model.`, such as `tuning.layers.0.self_attn.q_proj.bias` (also scale, lora_a [rank, in], lora_b [out, rank])
            and `tuning.norm.weight`.
        leftover: tensors that came with the adapter and have no place in it, such as the projections of an image model.
    """

    config: AdapterConfig
    base: dict[str, Any]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    leftover: dict[str, Tensor] = field(default_factory=dict)
