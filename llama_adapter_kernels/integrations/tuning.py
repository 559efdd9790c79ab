"""V2's tuning in a model: where its linears and norms are, and hooks that change what they compute.

A tuned module keeps its class and its names. It gets a submodule that holds the parameters of every adapter which tunes it,
and hooks that ask which adapter runs. Prompts of an adapter may bypass all of that (Tuning.prompts).
"""

from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llama_adapter_kernels.adapters.v2 import TunedLinear, TunedNorm, TunedPart, Tuning
from llama_adapter_kernels.integrations.bypass import is_bypassed
from llama_adapter_kernels.integrations.slot import ROUTING, SLOT, Routing
from llama_adapter_kernels.integrations.target import Target, execution_device

if TYPE_CHECKING:
    from llama_adapter_kernels.integrations.attachment import Attachment

TUNING = "zero_gate_tuning"  # the attribute of a tuned module that holds its TuningSlot
HEAD = "lm_head"  # what the output head is called in an adapter, whatever the model calls it
Shapes = dict[str, dict[str, tuple[int, ...]]]

# The routing of the layer that runs in this thread, and whose it is. Layers run again for gradients outside of any pass.
_in_layer: ContextVar[tuple[int, Routing] | None] = ContextVar("zero_gate_in_layer", default=None)


class TuningSlot(nn.Module):
    """What adapters tune in one module, by adapter name (its submodules)."""

    def __init__(self, attachment: "Attachment") -> None:
        super().__init__()
        self.attachment = attachment

    def current(self) -> Any:
        """What the adapter that runs now tunes here; None: nothing."""
        if is_bypassed(self.attachment):
            return None
        layer = None if torch.compiler.is_compiling() else _in_layer.get()
        if layer is not None and layer[0] == id(self.attachment):
            name = layer[1].selection.names[0]  # adapters that tune do not share a batch with others
        else:
            name = self.attachment.selection().names[0]
        return None if name is None else self._modules.get(name)


def expected_shapes(target: Target, tuning: Tuning) -> Shapes:
    """Shapes of the tuned parameters by the path of their module and by name.

    Raises:
        ValueError: the model has no module for something that is to be tuned.
    """
    shapes: Shapes = {}
    for path, module in _modules(target, tuning):
        sizes = _linear_sizes(module)
        name = path.rpartition(".")[2]
        if sizes is None:
            found = {name: tuple(value.shape) for name, value in module.named_parameters(recurse=False)}
        else:
            found = tuning.linear_shapes(name, *sizes, head=path == HEAD)
        if found:
            shapes[path] = found
    if isinstance(tuning.bias, tuple):
        missing = set(tuning.bias) - {path.rpartition(".")[2] for path, found in shapes.items() if "bias" in found}
        if missing:
            raise ValueError(f"tuning.bias: expected names of the model's linears, got {', '.join(sorted(missing))}")
    return shapes


def build(target: Target, tuning: Tuning) -> dict[str, TunedPart]:
    """The tuned parts of a new adapter by the path of their module."""
    shapes = expected_shapes(target, tuning)
    parts: dict[str, TunedPart] = {}
    for path, module in _modules(target, tuning):
        if path not in shapes:
            continue
        device = execution_device(module)
        if _linear_sizes(module) is None:
            parts[path] = TunedNorm(module, dict(module.named_parameters(recurse=False)), device)
        else:
            parts[path] = TunedLinear(shapes[path], tuning.scale == "input", device)
    return parts


def connect(target: Target, parts: Mapping[str, TunedPart], name: str, attachment: "Attachment") -> None:
    """Puts the parts of an adapter into the model's modules."""
    head = _head(target)
    for path, part in parts.items():
        module = head if path == HEAD and head is not None else target.stem.get_submodule(path)
        slot = module._modules.get(TUNING)
        if slot is None:
            slot = TuningSlot(attachment).train(module.training)
            module.add_module(TUNING, slot)
            module.register_forward_pre_hook(tune_input)
            module.register_forward_hook(tune_output)
            attachment.tuned.append(module)
        slot.add_module(name, part.train(module.training))
    if parts and attachment.keywords and not attachment.layers:
        before = target.architecture.attention.split("*")[0].strip(".")
        attachment.layers = list(target.stem.get_submodule(before).children())
        for layer in attachment.layers:
            layer.register_forward_pre_hook(before_layer, with_kwargs=True)
            layer.register_forward_hook(after_layer, always_call=True)


def disconnect(attachment: "Attachment", name: str) -> None:
    """Takes the parts of an adapter out; what no adapter tunes any more is as it was."""
    for module in list(attachment.tuned):
        slot: Any = module._modules[TUNING]
        slot._modules.pop(name, None)
        if not slot._modules:
            del module._modules[TUNING]
            _remove(module, tune_input, tune_output)
            attachment.tuned.remove(module)
    if not attachment.tuned:
        for layer in attachment.layers:
            _remove(layer, before_layer, after_layer)
            checkpoint: Any = getattr(layer, "_gradient_checkpointing_func", None)
            if isinstance(checkpoint, Carrying):
                layer._gradient_checkpointing_func = checkpoint.checkpoint
        attachment.layers = []


def tune_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Before a tuned linear: scales its input."""
    part = module._modules[TUNING].current()
    return (part(args[0]), *args[1:]) if isinstance(part, TunedLinear) and part.scales_inputs else None


def tune_output(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
    """After a tuned linear or norm."""
    part = module._modules[TUNING].current()
    if part is None:
        return None
    tuned: Tensor = part(args[0], output if isinstance(part, TunedLinear) else module)
    return tuned


def before_layer(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before a layer with tuned modules: says which adapter runs there."""
    routing = kwargs.get(ROUTING)
    if routing is None or torch.compiler.is_compiling():
        return
    _in_layer.set((id(_attachment_of(module)), routing))
    if getattr(module, "gradient_checkpointing", False) and not isinstance(
        module._gradient_checkpointing_func, Carrying
    ):
        module._gradient_checkpointing_func = Carrying(module._gradient_checkpointing_func)


def after_layer(module: nn.Module, args: Any, output: Any) -> None:
    """After it."""
    if not torch.compiler.is_compiling():
        _in_layer.set(None)


class Carrying:
    """A checkpointing function of transformers' layers: what runs again for gradients knows which adapter ran before.

    transformers checkpoints within a layer's hooks, which do not run again.
    """

    def __init__(self, checkpoint: Callable[..., Any]) -> None:
        self.checkpoint = checkpoint

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        running = _in_layer.get()

        def run(*arguments: Any) -> Any:
            token = _in_layer.set(running)
            try:
                return function(*arguments)
            finally:
                _in_layer.reset(token)

        return self.checkpoint(run, *args)


def _attachment_of(layer: nn.Module) -> "Attachment":
    slots = (module._modules[SLOT] for module in layer.modules() if module._modules.get(SLOT) is not None)
    attachment: Attachment = next(slots).attachment
    return attachment


def _remove(module: nn.Module, before: Any, after: Any) -> None:
    hooks = (
        (before, module._forward_pre_hooks, (module._forward_pre_hooks_with_kwargs,)),
        (after, module._forward_hooks, (module._forward_hooks_with_kwargs, module._forward_hooks_always_called)),
    )
    for function, table, flags in hooks:
        for key in [key for key, hook in table.items() if hook is function]:
            del table[key]
            for flag in flags:
                flag.pop(key, None)


def _modules(target: Target, tuning: Tuning) -> Iterator[tuple[str, nn.Module]]:
    """Linears of the layers, norms, and the output head as far as `tuning` asks, by their path from the stem."""
    layers = target.architecture.attention.split("*")[0]
    linears = bool(tuning.bias) or tuning.scale != "none" or tuning.lora_rank > 0
    for path, module in _outermost(target.stem, ""):
        if _linear_sizes(module) is None:
            if tuning.norms:
                yield path, module
        elif linears and path.startswith(layers):
            yield path, module
    if tuning.head:
        head = _head(target)
        if head is None:
            raise ValueError("tuning.head: expected a model with an output head, this one has none")
        yield HEAD, head


def _head(target: Target) -> nn.Module | None:
    head = target.model.get_output_embeddings() if hasattr(target.model, "get_output_embeddings") else None
    return head if isinstance(head, nn.Module) else None


def _outermost(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """Linears and norms within `module`; what is inside one of them (the parts of a LoRA) is its own affair."""
    for name, child in module.named_children():
        if name in (SLOT, TUNING):
            continue
        there = f"{path}{name}"
        if _linear_sizes(child) is not None or _is_norm(child):
            yield there, child
        else:
            yield from _outermost(child, f"{there}.")


def _is_norm(module: nn.Module) -> bool:
    return "Norm" in type(module).__name__ and any(True for _ in module.parameters(recurse=False))


def _linear_sizes(module: Any) -> tuple[int, int] | None:
    """Inputs and outputs of a linear: torch's, a quantised one, one with LoRA around it, or GPT-2's Conv1D."""
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return module.in_features, module.out_features
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return module.weight.shape[0], module.nf
    return None
