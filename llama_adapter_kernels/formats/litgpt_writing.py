"""Writes adapters as LitGPT does; see litgpt.py for its names and rows."""

from pathlib import Path

import torch
from torch import Tensor

from llama_adapter_kernels.adapters.state import AdapterState
from llama_adapter_kernels.adapters.v2 import Tuning
from llama_adapter_kernels.formats.writing import effective_gates, last_layers, save_new

_LINEARS = {
    "self_attn.o_proj": "attn.proj", "mlp.gate_proj": "mlp.fc_1", "mlp.up_proj": "mlp.fc_2", "mlp.down_proj": "mlp.proj",
}  # fmt: skip
_NORMS = {"input_layernorm": "norm_1", "post_attention_layernorm": "norm_2"}


def write(path: Path, state: AdapterState) -> tuple[str, ...]:
    """Writes a new file as LitGPT's fine-tuning does: `lit_model.pth.adapter`, or `.adapter_v2` for one with tuning.

    Returns:
        Notes on what LitGPT must be told, and on what is other than before.

    Raises:
        ValueError: LitGPT has nothing that does the same as this adapter; the message says why.
        OSError: the file cannot be written, or there is one already.
    """
    layers, config = last_layers(state, "LitGPT"), state.config
    total, legacy = state.base["num_hidden_layers"], config.prefix_rows == "legacy"
    gates, notes = effective_gates(state)
    heads = state.base.get("num_attention_heads")
    if heads is None and layers:
        raise ValueError("num_attention_heads: LitGPT has a gate for every head; name the base model that tells")
    tensors: dict[str, Tensor] = {}
    for layer in layers:
        tensors[f"transformer.h.{layer}.attn.adapter_wte.weight"] = state.tensors[f"layers.{layer}.prompt"]
        tensors[f"transformer.h.{layer}.attn.gating_factor"] = (
            gates[layer].expand(heads).reshape(1, 1, heads, 1).clone()
        )
    if config.tuning is not None:
        tensors |= _tuned_back(state, config.tuning, "attn.qkv" if legacy or not layers else "attn.attn")
    save_new(path, {"model": tensors})
    if layers:
        notes += (
            f"adapter_prompt_length={config.prefix_length}, adapter_start_layer={total - len(layers)} for LitGPT",
        )
        releases = "0.5.5 or later" if legacy else "up to 0.5.4: later ones take other rows for the prefix"
        notes += (f"for LitGPT {releases}",)
    return notes


def _tuned_back(state: AdapterState, tuning: Tuning, layout: str) -> dict[str, Tensor]:
    """The tuned tensors by their names in LitGPT."""
    if tuning.scale == "input" or tuning.lora_rank or tuning.new_gate:
        raise ValueError("tuning: LitGPT scales outputs and has neither LoRA nor new_gate: expected only what it has")
    if tuning.prompts != "tuned" and state.config.prefix_length:
        raise ValueError("tuning.prompts: LitGPT makes keys and values of prompts by the tuned projections, got base")
    tensors: dict[str, Tensor] = {}
    for layer in range(state.base["num_hidden_layers"]):
        place, ours = f"transformer.h.{layer}", f"tuning.layers.{layer}"
        for kind in ("scale", "bias"):
            parts = [state.tensors.get(f"{ours}.self_attn.{part}_proj.{kind}") for part in "qkv"]
            query, key, value = parts
            if query is not None and key is not None and value is not None:
                tensors[f"{place}.{layout}.adapter_{kind}"] = _fused_rows(query, key, value, layout, state)
            elif any(part is not None for part in parts):
                raise ValueError(f"tuning.{kind}: LitGPT has one for queries, keys and values, got some of them")
            for target, name in _LINEARS.items():
                if (tensor := state.tensors.get(f"{ours}.{target}.{kind}")) is not None:
                    tensors[f"{place}.{name}.adapter_{kind}"] = tensor
        for target, name in _NORMS.items():
            if tuning.norms:
                tensors[f"{place}.{name}.weight"] = state.tensors[f"{ours}.{target}.weight"]
    ends = {"tuning.norm.weight": "transformer.ln_f.weight"}
    ends |= {f"tuning.lm_head.{kind}": f"lm_head.adapter_{kind}" for kind in ("scale", "bias")}
    return tensors | {name: state.tensors[ours] for ours, name in ends.items() if ours in state.tensors}


def _fused_rows(query: Tensor, key: Tensor, value: Tensor, layout: str, state: AdapterState) -> Tensor:
    if layout != "attn.attn":
        return torch.cat([query, key, value])
    groups = state.base.get("num_key_value_heads")
    if groups is None:
        raise ValueError("num_key_value_heads: LitGPT groups heads by them; name the base model that tells")
    return torch.cat([part.reshape(groups, -1) for part in (query, key, value)], dim=1).reshape(-1)
