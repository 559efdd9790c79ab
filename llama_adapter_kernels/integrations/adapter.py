"""The adapter of one model, as users hold it: its parameters, and the way to and from files."""

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llama_adapter_kernels.adapters.config import AdapterConfig
from llama_adapter_kernels.adapters.layer import AdapterLayer
from llama_adapter_kernels.adapters.state import AdapterState
from llama_adapter_kernels.formats import native


class ZeroGateAdapter(nn.Module):
    """The parameters of one adapter and the model they belong to; what `attach_adapter` and `load_adapter` return.

    Args:
        config: see AdapterConfig.
        base: facts of the model that a saved adapter must find again: model_type, hidden_size, num_hidden_layers,
            num_attention_heads, num_key_value_heads, head_dim.
        devices: of every layer of the model; an adapted layer's parameters live where the layer does.
    """

    def __init__(self, config: AdapterConfig, base: dict[str, Any], devices: Sequence[torch.device]) -> None:
        super().__init__()
        self.config, self.base = config, base
        numbers = config.layer_numbers(base["num_hidden_layers"])
        hidden_size, heads = base["hidden_size"], base["num_attention_heads"]
        self.layers = nn.ModuleDict({str(n): AdapterLayer(config, hidden_size, heads, devices[n]) for n in numbers})

    def num_parameters(self) -> int:
        """Trainable parameters: prompts and gates."""
        return sum(parameter.numel() for parameter in self.parameters())

    def gates(self) -> dict[int, Tensor]:
        """What multiplies the prefix branch, by layer number: [heads] or [1], float32, detached."""
        return {int(n): layer.effective_gate().detach() for n, layer in self.layers.items()}

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Writes the adapter into the folder `path`, in this package's own format (formats/native.py).

        Raises:
            OSError: the folder cannot be written; files that were there stay whole.
        """
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        native.write(path, AdapterState(self.config, self.base, tensors))

    def load_tensors(self, state: AdapterState, source: str) -> None:
        """Fills prompts and gates from `state`; `source` names it in messages.

        Raises:
            ValueError: names or shapes differ; the message gives both.
        """
        own = self.state_dict()
        if state.tensors.keys() != own.keys():
            raise ValueError(f"{source}: expected tensors {sorted(own)}, got {sorted(state.tensors)}")
        for name, tensor in state.tensors.items():
            if tensor.shape != own[name].shape:
                raise ValueError(f"{source}: {name}: expected shape {list(own[name].shape)}, got {list(tensor.shape)}")
        self.load_state_dict(state.tensors)
