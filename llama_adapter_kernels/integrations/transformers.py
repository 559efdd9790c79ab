"""Adapters in Hugging Face transformers models, through the attention hook.

The hook hands over query [B, Hq, S, D] (rotated and normed), key and value un-repeated with the whole cache, and what the
mask function of the same name returned: here a bool mask [B, 1, Sq, Sk], or None for pure causality.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from llama_adapter_kernels.adapter import AdapterConfig, AdapterLayer, ZeroGateAdapter, read_config, read_weights
from llama_adapter_kernels.attention import zero_gate_attention, zero_gate_attention_varlen, zero_gate_decode

IMPLEMENTATION = "zero_gate"  # must not contain "flash": transformers treats such names differently
SUPPORTED = ("llama", "mistral", "qwen2", "qwen3")
_REFUSED = {"softcap": "a soft cap on scores", "s_aux": "attention sinks", "position_bias": "a position bias"}
_LAYER = "zero_gate"  # the attribute of an attention module that holds its AdapterLayer


def attach_adapter(model: nn.Module, config: AdapterConfig) -> ZeroGateAdapter:
    """Gives a transformers model a new adapter: prompts from N(0, 1), gates 0, so that at first nothing changes.

    The model is frozen; only the adapter's parameters (float32, part of `model.parameters()`) require gradients.

    Args:
        model: Llama, Mistral, Qwen2 or Qwen3, with or without a head.
        config: see AdapterConfig.

    Returns:
        The adapter: its parameters, `num_parameters()`, `gates()`, `save_pretrained(path)`.

    Raises:
        ValueError: the architecture is not supported, the config does not fit, or an adapter is attached already.
    """
    attentions = _attention_modules(model)
    if any(hasattr(attention, _LAYER) for attention in attentions):
        raise ValueError("model: expected one without an adapter; detach_adapter(model) removes the one it has")
    adapter = ZeroGateAdapter(config, _base_facts(model, attentions[0]), next(model.parameters()).device)
    _register()
    before = model.config._attn_implementation
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    for number, layer in adapter.layers.items():
        setattr(attentions[int(number)], _LAYER, layer)
    model.set_attn_implementation(IMPLEMENTATION)
    model._zero_gate_undo = (before, trainable)
    return adapter


def detach_adapter(model: nn.Module) -> None:
    """Removes the adapter; attention implementation and `requires_grad` of the model become what they were.

    Raises:
        ValueError: the model has none.
    """
    undo = getattr(model, "_zero_gate_undo", None)
    if undo is None:
        raise ValueError("model: expected one with an adapter, it has none")
    for attention in _attention_modules(model):
        if hasattr(attention, _LAYER):
            delattr(attention, _LAYER)
    implementation, trainable = undo
    model.set_attn_implementation(implementation)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in set(trainable))
    del model._zero_gate_undo


def load_adapter(model: nn.Module, path: Any) -> ZeroGateAdapter:
    """Attaches the adapter saved in the folder `path`.

    Raises:
        ValueError: it belongs to another model (both are named), or its files are not those of an adapter.
        OSError: there are no such files.
    """
    config, base = read_config(path)
    own = _base_facts(model, _attention_modules(model)[0])
    different = [name for name in own if own[name] != base.get(name)]
    if different:
        theirs = ", ".join(f"{name} {base.get(name)}" for name in different)
        ours = ", ".join(f"{name} {own[name]}" for name in different)
        raise ValueError(f"{path}: the adapter was made for a model with {theirs}; this model has {ours}")
    adapter = attach_adapter(model, config)
    try:
        read_weights(adapter, path)
    except Exception:
        detach_adapter(model)
        raise
    return adapter


def _attention_modules(model: nn.Module) -> list[Any]:
    """The self-attention modules in order.

    Raises:
        ValueError: not a supported architecture.
    """
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    decoder = getattr(model, "model", model)
    if kind not in SUPPORTED or not hasattr(decoder, "layers"):
        raise ValueError(f"model: expected a transformers model of type {', '.join(SUPPORTED)}, got {kind}")
    return [layer.self_attn for layer in decoder.layers]


def _base_facts(model: Any, attention: Any) -> dict[str, Any]:
    names = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    return {name: getattr(model.config, name) for name in names} | {"head_dim": attention.head_dim}


def _register() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(IMPLEMENTATION, attention)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in place of its own attention. Returns (output [B, S, Hq, D], None)."""
    if dropout:
        raise ValueError(f"attention_dropout: expected 0 with a zero-gate adapter, got {dropout}")
    for name, what in _REFUSED.items():
        if kwargs.get(name) is not None:
            raise ValueError(f"{name}: {what} is not supported with a zero-gate adapter")
    layer: AdapterLayer | None = getattr(module, _LAYER, None)
    prefix_key = prefix_value = gate = None
    if layer is not None:
        prefix_key, prefix_value, gate = layer.prefix(
            lambda prompt: _project(module, prompt), lambda: _weights(module), query.dtype
        )
    if kwargs.get("cu_seq_lens_q") is not None and attention_mask is None:
        output = _packed(query, key, value, prefix_key, prefix_value, gate, scaling, kwargs)
        return output, None
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if causal and attention_mask is None and 1 < query.shape[2] < key.shape[2]:
        # transformers leaves the mask out here only for the first pass into a static cache, counting on an alignment at the
        # top left: the keys behind the queries are empty slots.
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
    needs_gradient = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (query, key, value, prefix_key, gate)
    )
    if query.shape[2] == 1 and attention_mask is None and not needs_gradient:
        output = zero_gate_decode(query, key, value, None, prefix_key, prefix_value, gate, scale=scaling)
    else:
        output = zero_gate_attention(
            query, key, value, prefix_key, prefix_value, gate, is_causal=attention_mask is None and causal,
            scale=scaling, attn_mask=attention_mask,
        )  # fmt: skip
    return output.transpose(1, 2), None


def _packed(
    query: Tensor, key: Tensor, value: Tensor, prefix_key: Tensor | None, prefix_value: Tensor | None,
    gate: Tensor | None, scaling: float | None, kwargs: dict[str, Any],
) -> Tensor:  # fmt: skip
    """Packed sequences [1, H, T, D] that do not see each other."""
    if query.shape[0] != 1:
        raise ValueError(f"cu_seq_lens_q: expected one row of packed sequences, got a batch of {query.shape[0]}")
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    output = zero_gate_attention_varlen(
        query, key, value, prefix_key, prefix_value, gate,
        cu_seqlens_q=kwargs["cu_seq_lens_q"], cu_seqlens_k=kwargs["cu_seq_lens_k"],
        max_seqlen_q=int(kwargs["max_length_q"]), max_seqlen_k=int(kwargs["max_length_k"]), is_causal=True, scale=scaling,
    )  # fmt: skip
    return output[None]


def _project(module: Any, prompt: Tensor) -> tuple[Tensor, Tensor]:
    """Prefix key and value [1, Hkv, P, D]: through the layer's own projections (and key norm), never rotated."""
    key = module.k_proj(prompt).view(1, prompt.shape[0], -1, module.head_dim)
    value = module.v_proj(prompt).view(1, prompt.shape[0], -1, module.head_dim)
    if hasattr(module, "k_norm"):  # Qwen3 norms each key head
        key = module.k_norm(key)
    return key.transpose(1, 2), value.transpose(1, 2)


def _weights(module: Any) -> Iterator[Tensor]:
    for name in ("k_proj", "v_proj", "k_norm"):
        projection = getattr(module, name, None)
        if isinstance(projection, nn.Module):
            yield from projection.parameters()
            yield from projection.buffers()
