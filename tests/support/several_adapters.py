"""One small model with four adapters of different lengths, gates and layers, and a batch that mixes them."""

import torch
from torch import nn

import llama_adapter_kernels as lak
from tests.support.small_models import TOKENS, build

# Different lengths (2 divides 4, 3 does not), gate forms and layers.
KINDS = {
    "a": {"prefix_length": 4},
    "b": {"prefix_length": 2, "gate": "identity", "gate_shape": "scalar"},
    "c": {"prefix_length": 3, "layers": (0, 2)},
    "d": {"prefix_length": 4, "num_layers": 1, "gate_shape": "scalar"},
}
MIXED = ["c", None, "a", "b", "d", "a"]
ROWS = torch.stack([TOKENS[0, :9] + 3 * i for i in range(len(MIXED))])


def served(name: str = "llama", kinds: dict[str, dict] = KINDS) -> nn.Module:
    model = build(name)
    torch.manual_seed(7)
    for adapter, fields in kinds.items():
        handle = lak.attach_adapter(model, lak.AdapterConfig(**fields), adapter)
        for layer in handle.layers.values():
            nn.init.uniform_(layer.gate, 0.5, 1.2)
    return model


def alone(model: nn.Module, name: str | None) -> nn.Module:
    lak.set_adapter(model, name)
    return model
