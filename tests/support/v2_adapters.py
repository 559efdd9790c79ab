"""Adapters of V2, which tune the model itself, on small models."""

import torch
from torch import nn

import llama_adapter_kernels as lak

V2 = lak.AdapterConfig(prefix_length=4, num_layers=2, tuning=lak.Tuning(lora_rank=3))
OTHERS = {
    "outputs": lak.Tuning(scale="output", lora_rank=2, new_gate=False, head=True, prompts="tuned"),
    "bias of some": lak.Tuning(bias=("q_proj", "down_proj"), scale="none", norms=False, lora_rank=0, new_gate=False),
    "norms": lak.Tuning(bias=False, scale="none", norms=True, lora_rank=0, new_gate=False),
    "new gate": lak.Tuning(bias=False, scale="none", norms=False, lora_rank=0),
}


def v2(
    model: nn.Module, name: str = "default", opened: bool = True, config: lak.AdapterConfig = V2
) -> lak.ZeroGateAdapter:
    """An adapter that tunes; `opened`: every parameter away from where it starts."""
    adapter = lak.attach_adapter(model, config, name)
    if opened:
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter += 0.3 * torch.randn_like(parameter)
    return adapter
