"""Where an adapter goes in a model: the module that runs, its attention modules, and reasons why it cannot go there."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from llama_adapter_kernels.integrations import registry
from llama_adapter_kernels.integrations.architectures import Architecture, Fused, Heads, Separate
from llama_adapter_kernels.integrations.transformers.architectures import CANNOT, PARTS


@dataclass(frozen=True)
class Target:
    """A model that takes adapters.

    Attributes:
        outer: the model as it was given.
        model: the same without PEFT around it.
        stem: the module whose forward pass the adapters take part in.
        attentions: the attention modules in order.
        config: of the part of the model that is adapted; None for models without one.
    """

    outer: nn.Module
    model: nn.Module
    stem: nn.Module
    attentions: tuple[nn.Module, ...]
    architecture: Architecture
    heads: Heads
    hidden_size: int
    config: Any

    def facts(self) -> dict[str, Any]:
        """What a saved adapter must find again in the model it is loaded into."""
        return {
            "model_type": self.architecture.model_type, "hidden_size": self.hidden_size,
            "num_hidden_layers": len(self.attentions), "num_attention_heads": self.heads.query,
            "num_key_value_heads": self.heads.key, "head_dim": self.heads.head_dim,
        }  # fmt: skip


def without_peft(model: Any) -> Any:
    """The model inside a PEFT model."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def find_target(outer: Any) -> Target:
    """Where an adapter goes in this model.

    Raises:
        ValueError: in one sentence, why none can.
    """
    if not isinstance(outer, nn.Module):
        raise ValueError(f"model: expected a torch.nn.Module, got {type(outer).__name__}")
    model = without_peft(outer)
    for module in model.modules():
        if hasattr(module, "adaption_prompt"):
            raise ValueError("model: expected one without PEFT's AdaptionPrompt, whose prompts go to the same place")
    base = getattr(model, "base_model", model)  # transformers' name for the model without its head
    kind, base, config = _part(_model_type(model), base, getattr(model, "config", None))
    architecture = registry.find_architecture(kind)
    if architecture is None:
        raise ValueError(_reason(kind))
    reason = architecture.refuse(config) if architecture.refuse is not None else None
    if reason is not None:
        raise ValueError(f"model: a {kind} of this configuration cannot take an adapter: {reason}")
    refuse_probabilities(config)
    stem = _at(base, architecture.stem) if architecture.stem and hasattr(base, architecture.stem) else base
    attentions = _attention_modules(stem, architecture)
    heads = architecture.heads(attentions[0] if config is None else config)
    _check(model, attentions, architecture, heads)
    hidden_size = attentions[0].qkv.in_features if config is None else int(config.hidden_size)
    return Target(outer, model, stem, attentions, architecture, heads, hidden_size, config)


def refuse_probabilities(config: Any) -> None:
    """Raises ValueError if a model is configured to return the probabilities of its attention."""
    if getattr(config, "output_attentions", False):
        raise ValueError(
            "config.output_attentions: expected False (the probabilities never exist as a tensor), got True"
        )


def execution_device(module: nn.Module) -> torch.device:
    """Where a module computes. accelerate may keep its weights elsewhere until then; weights may be buffers only."""
    for part in module.modules():
        device = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    return torch.get_default_device()


def _model_type(model: Any) -> str:
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if isinstance(kind, str):
        return kind
    known = {row.model_type for row in registry.known_architectures()}
    return next((cls.__name__ for cls in type(model).__mro__ if cls.__name__ in known), type(model).__name__)


def _part(kind: str, base: Any, config: Any) -> tuple[str, Any, Any]:
    """The part of a model made of several that an adapter belongs to: (its model_type, it, its configuration)."""
    while kind in PARTS:
        parts = [name for name in PARTS[kind] if isinstance(getattr(base, name, None), nn.Module)]
        if not parts:
            break
        if len(parts) > 1:
            places = ", ".join(f"model.{name}" for name in parts)
            raise ValueError(f"model: a {kind} has several parts; attach to one of them: {places}")
        base = getattr(base, parts[0])
        config = base.config
        kind = config.model_type
    return kind, base, config


def _reason(kind: str) -> str:
    if kind in CANNOT:
        return f"model: a {kind} cannot take an adapter: {CANNOT[kind]}"
    known = ", ".join(sorted(row.model_type for row in registry.known_architectures()))
    return (
        f"model: expected one of a known type ({known}), got {kind}; lak.register_architecture makes another one known"
    )


def _at(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name)
    return module


def layers_of(target: Target) -> tuple[nn.Module, ...]:
    """The layers that the attention modules belong to, in order."""
    return tuple(_at(target.stem, target.architecture.attention.split("*")[0].strip(".")))


def _attention_modules(stem: nn.Module, architecture: Architecture) -> tuple[Any, ...]:
    before, after = (part.strip(".") for part in architecture.attention.split("*"))
    try:
        return tuple(_at(layer, after) if after else layer for layer in _at(stem, before))
    except (AttributeError, TypeError) as error:
        raise ValueError(
            f"model: expected the attention modules of a {architecture.model_type} at {architecture.attention} of "
            f"{type(stem).__name__} ({error})"
        ) from None


def _check(model: Any, attentions: tuple[Any, ...], architecture: Architecture, heads: Heads) -> None:
    if not attentions:
        raise ValueError(f"model: expected at least one attention module at {architecture.attention}, got none")
    project = architecture.project
    theirs = architecture.compute().__mro__[:2] if architecture.compute is not None else None
    for number, module in enumerate(attentions):
        if theirs is not None and type(module) not in theirs:
            raise ValueError(
                f"model: expected layer {number}'s attention to be {theirs[1].__name__}, got {type(module).__name__}"
            )
        if isinstance(project, Separate | Fused):
            for name in project.parts():
                if not hasattr(module, name):
                    raise ValueError(
                        f"model: expected layer {number}'s {type(module).__name__} to have {name}, it has none"
                    )
        if isinstance(project, Separate):
            width = getattr(getattr(module, project.key), "out_features", None)
            if width is not None and width != heads.key * heads.head_dim:
                raise ValueError(
                    f"model: expected layer {number}'s {project.key} to give {heads.key} heads of {heads.head_dim}, "
                    f"got a width of {width}"
                )
    if getattr(model, "tp_size", None) not in (None, 1) or any(_tensor_parallel(p) for p in model.parameters()):
        raise ValueError(
            "model: expected one without tensor parallelism: gates and prefixes belong to all heads of a layer, each "
            "process would have some of them"
        )


def _tensor_parallel(parameter: Any) -> bool:
    names = getattr(getattr(parameter, "device_mesh", None), "mesh_dim_names", None)
    return names is not None and "tp" in names
