"""Adapters in Hugging Face transformers models: attach, detach, load."""

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from llama_adapter_kernels.adapters.config import AdapterConfig
from llama_adapter_kernels.formats import native
from llama_adapter_kernels.integrations import freezing
from llama_adapter_kernels.integrations.adapter import ZeroGateAdapter
from llama_adapter_kernels.integrations.transformers.attention import LAYER, attention
from llama_adapter_kernels.integrations.transformers.masks import zero_gate_mask

IMPLEMENTATION = "zero_gate"  # must not contain "flash": transformers treats such names differently
SUPPORTED = ("llama", "mistral", "qwen2", "qwen3")


def attach_adapter(model: nn.Module, config: AdapterConfig) -> ZeroGateAdapter:
    """Gives a transformers model a new adapter: prompts from N(0, 1), gates 0, so that at first nothing changes.

    The model is frozen; only the adapter's parameters (float32, part of `model.parameters()`) require gradients.
    Whether keys and values of the prompts may be kept between calls follows `model.eval()` and `torch.no_grad()`.

    Args:
        model: Llama, Mistral, Qwen2 or Qwen3, with or without a head.
        config: see AdapterConfig.

    Returns:
        The adapter: its parameters, `num_parameters()`, `gates()`, `save_pretrained(path)`.

    Raises:
        ValueError: the architecture is not supported, the config does not fit, or an adapter is attached already.
    """
    model = _without_peft(model)
    attentions = _attention_modules(model)
    if any(hasattr(attention, LAYER) for attention in attentions):
        raise ValueError("model: expected one without an adapter; detach_adapter(model) removes the one it has")
    if getattr(model.config, "output_attentions", False):
        raise ValueError(
            "config.output_attentions: expected False (the probabilities never exist as a tensor), got True"
        )
    if config.tuning is not None or config.prefix_rows != "own":
        raise ValueError("config.tuning, config.prefix_rows: expected none and own, others cannot be attached yet")
    devices = [_device(attention) for attention in attentions]
    adapter = ZeroGateAdapter(config, _base_facts(model, attentions[0]), devices)
    _register()
    before = model.config._attn_implementation
    trainable = freezing.freeze(model)
    for number, layer in adapter.layers.items():
        module = attentions[int(number)]
        setattr(module, LAYER, layer.train(module.training))
    model.set_attn_implementation(IMPLEMENTATION)
    model._zero_gate_undo = (before, trainable)
    return adapter


def detach_adapter(model: nn.Module) -> None:
    """Removes the adapter; attention implementation and `requires_grad` of the model become what they were at attach.

    Raises:
        ValueError: the model has none.
    """
    model = _without_peft(model)
    undo = getattr(model, "_zero_gate_undo", None)
    if undo is None:
        raise ValueError("model: expected one with an adapter, it has none")
    for module in _attention_modules(model):
        if hasattr(module, LAYER):
            delattr(module, LAYER)
    implementation, trainable = undo
    model.set_attn_implementation(implementation)
    freezing.restore(model, trainable)
    del model._zero_gate_undo


def load_adapter(model: nn.Module, path: Any) -> ZeroGateAdapter:
    """Attaches the adapter saved in the folder `path`.

    Raises:
        ValueError: it belongs to another model (both are named), or its files are not those of an adapter.
        OSError: there are no such files.
    """
    model = _without_peft(model)
    saved = native.read(path)
    base = saved.base
    own = _base_facts(model, _attention_modules(model)[0])
    different = [name for name in own if own[name] != base.get(name)]
    if different:
        theirs = ", ".join(f"{name} {base.get(name)}" for name in different)
        ours = ", ".join(f"{name} {own[name]}" for name in different)
        raise ValueError(f"{path}: the adapter was made for a model with {theirs}; this model has {ours}")
    adapter = attach_adapter(model, saved.config)
    try:
        adapter.load_tensors(saved, str(path))
    except Exception:
        detach_adapter(model)
        raise
    return adapter


def _without_peft(model: Any) -> Any:
    """The transformers model inside a PEFT model."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _attention_modules(model: Any) -> list[Any]:
    """The self-attention modules in order.

    Raises:
        ValueError: not a supported architecture.
    """
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    decoder = getattr(model, "base_model", model)  # transformers' name for the model without its head
    if kind not in SUPPORTED or not hasattr(decoder, "layers"):
        raise ValueError(f"model: expected a transformers model of type {', '.join(SUPPORTED)}, got {kind}")
    return [layer.self_attn for layer in decoder.layers]


def _device(attention: Any) -> torch.device:
    """Where a layer computes: accelerate may keep its weights elsewhere until then."""
    hook = getattr(attention.k_proj, "_hf_hook", None) or getattr(attention, "_hf_hook", None)
    execution_device = getattr(hook, "execution_device", None)
    return next(attention.parameters()).device if execution_device is None else torch.device(execution_device)


def _base_facts(model: Any, attention: Any) -> dict[str, Any]:
    names = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    return {name: getattr(model.config, name) for name in names} | {"head_dim": attention.head_dim}


def _register() -> None:
    AttentionInterface.register(IMPLEMENTATION, attention)
    AttentionMaskInterface.register(IMPLEMENTATION, zero_gate_mask)
