"""PEFT's AdaptionPrompt on the fused operation: switch a PEFT model over, and back."""

from typing import Any

from peft.tuners.adaption_prompt import AdaptionPromptModel
from torch import nn

from llama_adapter_kernels.adapters.selection import Selection
from llama_adapter_kernels.integrations.attachment import ATTRIBUTE
from llama_adapter_kernels.integrations.generations import Generations, new_tokens
from llama_adapter_kernels.integrations.peft import fused_prompt
from llama_adapter_kernels.integrations.registry import find_architecture
from llama_adapter_kernels.integrations.slot import ROUTING, Routing
from llama_adapter_kernels.integrations.target import Target, refuse_probabilities
from llama_adapter_kernels.integrations.transformers import connect, methods

ACCELERATED = "_zero_gate_peft"  # of the module whose forward passes the prompts take part in
MODEL_TYPES = ("llama", "mistral", "gpt2")
_PLAIN = Selection((None,), whole=True)
_UNDO = "lak.restore_peft(model)"


def accelerate_peft(model: nn.Module) -> nn.Module:
    """Makes the AdaptionPrompt modules of a PEFT model run the fused operation.

    Outputs and gradients stay PEFT's within rounding, also where PEFT is odd (docs/peft.md). Parameters keep their names, so
    state dicts, saving, loading, `set_adapter`, `add_adapter` and `disable_adapter` are as before. During a generation the
    keys and values of the prompts are computed once.

    Args:
        model: a PEFT model with AdaptionPrompt on Llama, Mistral or GPT-2. It is changed in place.

    Returns:
        The same model. `restore_peft` gives it back as it was.

    Raises:
        ValueError: it has no AdaptionPrompt, is of another architecture or is accelerated already. The model is as before.
    """
    tuner = _find_tuner(model)
    stem = tuner.model.base_model
    if hasattr(stem, ACCELERATED):
        raise ValueError(f"model: expected one that is not accelerated yet; {_UNDO} takes that back")
    target = _target(tuner)
    modules = (tuner, *_adapted(tuner))
    for module in modules:
        if type(module) not in fused_prompt.FUSED:
            raise ValueError(f"model: expected PEFT's own modules of AdaptionPrompt, got {type(module).__name__}")
    accelerated = Accelerated(*connect.connect(target), *methods.refuse_implementations(target, _UNDO))
    setattr(stem, ACCELERATED, accelerated)
    stem.register_forward_pre_hook(before_forward, with_kwargs=True)
    for module in modules:
        fused_prompt.fuse(module)
    return model


def restore_peft(model: nn.Module) -> nn.Module:
    """Takes `accelerate_peft` back: PEFT's own code and the model's own attention run again. Returns the model.

    Raises:
        ValueError: the model is not accelerated.
    """
    tuner = _find_tuner(model)
    stem = tuner.model.base_model
    accelerated: Accelerated | None = getattr(stem, ACCELERATED, None)
    if accelerated is None:
        raise ValueError("model: expected one that lak.accelerate_peft has changed, got one that it has not")
    for module in (tuner, *_adapted(tuner)):
        fused_prompt.unfuse(module)
    for key in [key for key, hook in stem._forward_pre_hooks.items() if hook is before_forward]:
        del stem._forward_pre_hooks[key]
        stem._forward_pre_hooks_with_kwargs.pop(key, None)
    for undo in reversed(accelerated.undo):
        undo()
    delattr(stem, ACCELERATED)
    return model


class Accelerated:
    """What lives between the forward passes of an accelerated model.

    Attributes:
        generations: with the prompts' keys and values, by PEFT's module.
        undo: what `restore_peft` gives back, besides the classes of modules.
    """

    def __init__(self, *undo: Any) -> None:
        self.generations, self.undo = Generations(), list(undo)

    def __getstate__(self) -> dict[str, Any]:
        return {"undo": self.undo}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(*state["undo"])  # type: ignore[misc]


def before_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Before a forward pass of the base model: finds what this generation has computed already."""
    connect.check_call(module, kwargs, _UNDO)
    accelerated: Accelerated = getattr(module, ACCELERATED)
    past = kwargs.get("past_key_values")
    tokens = 0 if past is None else new_tokens(args, kwargs)
    kwargs[ROUTING] = Routing(_PLAIN, kept=accelerated.generations.prefixes(module, past, tokens, _PLAIN))
    return args, kwargs


def _find_tuner(model: Any) -> Any:
    """PEFT's AdaptionPromptModel within a model."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: expected a PEFT model with AdaptionPrompt, got {type(model).__name__}")
    tuners = [module for module in model.modules() if isinstance(module, AdaptionPromptModel)]
    if len(tuners) != 1:
        kinds = ", ".join(str(config.peft_type.value) for config in getattr(model, "peft_config", {}).values())
        got = f"{type(model).__name__} with {kinds}" if kinds else type(model).__name__
        raise ValueError(f"model: expected a PEFT model with AdaptionPrompt, got a {got}")
    return tuners[0]


def _adapted(tuner: Any) -> list[nn.Module]:
    """PEFT's modules of all adapters: of the one that runs, and those that PEFT keeps aside."""
    running = [module for module in tuner.model.modules() if hasattr(module, "adaption_prompt")]
    return [*running, *(module for modules in tuner._cached_adapters.values() for module in modules)]


def _target(tuner: Any) -> Target:
    """The base model as what adapters are attached to; its attention modules without PEFT's around them.

    Raises:
        ValueError: it is of another architecture, or has adapters of `attach_adapter`.
    """
    model = tuner.model
    kind = model.config.model_type
    architecture = find_architecture(kind)
    if kind not in MODEL_TYPES or architecture is None:
        raise ValueError(f"model: expected one of {', '.join(MODEL_TYPES)}, got {kind}")
    stem = model.base_model
    refuse_probabilities(model.config)
    if any(ATTRIBUTE in module.__dict__ for module in model.modules()):
        raise ValueError(
            "model: expected one without adapters of attach_adapter; lak.detach_adapter(model) comes first"
        )
    layers = getattr(stem, architecture.attention.split(".")[0])
    name = architecture.attention.split(".")[-1]
    modules = (getattr(layer, name) for layer in layers)
    attentions = tuple(getattr(module, "model", module) for module in modules)
    heads = architecture.heads(model.config)
    return Target(model, model, stem, attentions, architecture, heads, model.config.hidden_size, model.config)
