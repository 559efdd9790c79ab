"""LLaMA-Adapter V2 (arXiv 2304.15010): small changes of the frozen model itself, trained along with prompts and gates."""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from llama_adapter_kernels.adapters.precision import KeepsFloat32

LINEAR_KINDS = ("bias", "scale", "lora_a", "lora_b")


@dataclass(frozen=True)
class Tuning:
    """What is trained in every linear and norm of the model, besides prompts and gates. At first it changes nothing.

        y = (W + B A) (x * scale) + bias     scale "input" (the paper, with its LoRA variant)
        y = scale * ((W + B A) x + bias)     scale "output" (LitGPT)

    Args:
        bias: behind each linear of the layers (True), behind none (False), or behind those of these names ("q_proj", ...).
        scale: "input", "output" or "none".
        norms: weights of their own for all norms.
        lora_rank: of A and B, for each linear of the layers; 0: none.
        new_gate: a factor from 1 on each layer's gate.
        head: the output head has bias and scale, too.
        prompts: "base" (prompts become keys and values by the frozen projections) or "tuned" (by the tuned ones).

    Raises:
        ValueError: a field is out of range, or nothing is left to tune.
    """

    bias: bool | tuple[str, ...] = True
    scale: str = "input"
    norms: bool = True
    lora_rank: int = 16
    new_gate: bool = True
    head: bool = False
    prompts: str = "base"

    def __post_init__(self) -> None:
        if isinstance(self.bias, list):
            object.__setattr__(self, "bias", tuple(self.bias))
        if not isinstance(self.bias, bool) and not (
            isinstance(self.bias, tuple) and self.bias and all(isinstance(name, str) for name in self.bias)
        ):
            raise ValueError(f"bias: expected true, false or names of linears, got {self.bias!r:.80}")
        for name, values in (("scale", ("input", "output", "none")), ("prompts", ("base", "tuned"))):
            if getattr(self, name) not in values:
                raise ValueError(f"{name}: expected {', '.join(values)}, got {getattr(self, name)!r:.80}")
        for name in ("norms", "new_gate", "head"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}: expected true or false, got {getattr(self, name)!r:.80}")
        if type(self.lora_rank) is not int or not 0 <= self.lora_rank <= 1 << 16:
            raise ValueError(f"lora_rank: expected a whole number from 0 (none) to 65536, got {self.lora_rank!r:.80}")
        if not (self.bias or self.scale != "none" or self.norms or self.lora_rank or self.new_gate):
            raise ValueError("bias, scale, norms, lora_rank, new_gate: expected at least one of them, got none")
        if self.head and not (self.bias is True or self.scale != "none"):
            raise ValueError("head: expected bias or scale with it, got neither")

    def linear_shapes(self, name: str, inputs: int, outputs: int, head: bool = False) -> dict[str, tuple[int, ...]]:
        """Shapes of what a linear of this name (its last part) gets; empty: nothing."""
        shapes: dict[str, tuple[int, ...]] = {}
        if self.bias is True or (isinstance(self.bias, tuple) and name in self.bias):
            shapes["bias"] = (outputs,)
        if self.scale != "none":
            shapes["scale"] = (inputs,) if self.scale == "input" else (outputs,)
        if self.lora_rank and not head:
            shapes |= {"lora_a": (self.lora_rank, inputs), "lora_b": (outputs, self.lora_rank)}
        return shapes


class TunedPart(KeepsFloat32):
    """What an adapter tunes in one module. Its parameters are read in `forward` only: offloading brings them back there."""


class TunedLinear(TunedPart):
    """What an adapter tunes in one linear.

    Args:
        shapes: of its parameters (see Tuning.linear_shapes). scale starts as 1, bias and lora_b as 0.
        scales_inputs: scale is for the linear's inputs.
        device: of the linear.
    """

    bias: Tensor | None
    scale: Tensor | None
    lora_a: Tensor | None
    lora_b: Tensor | None

    def __init__(self, shapes: dict[str, tuple[int, ...]], scales_inputs: bool, device: torch.device) -> None:
        super().__init__()
        self.scales_inputs = scales_inputs and "scale" in shapes
        for kind in LINEAR_KINDS:
            if kind not in shapes:
                self.register_parameter(kind, None)
                continue
            value = torch.full(shapes[kind], float(kind == "scale"), device=device, dtype=torch.float32)
            if kind == "lora_a":
                nn.init.kaiming_uniform_(value, a=5**0.5)  # as nn.Linear starts
            self.register_parameter(kind, nn.Parameter(value))

    def forward(self, x: Tensor, output: Tensor | None = None) -> Tensor:
        """Inputs for the linear if there is no `output` yet, otherwise what its output becomes.

        Args:
            x: [..., in] of the linear, scaled already where scales are for inputs.
            output: [..., out].
        """
        if output is None:
            assert self.scale is not None
            return x * self.scale.to(x.dtype)
        dtype = output.dtype
        if self.lora_a is not None and self.lora_b is not None:
            output = output + linear(linear(x.to(dtype), self.lora_a.to(dtype)), self.lora_b.to(dtype))
        if self.bias is not None:
            output = output + self.bias.to(dtype)
        if self.scale is not None and not self.scales_inputs:
            output = output * self.scale.to(dtype)
        return output


class TunedNorm(TunedPart):
    """Weights of an adapter's own for one norm, at first those of the norm.

    Args:
        norm: the norm, whose computation it keeps.
        values: of its parameters, by name.
    """

    def __init__(self, norm: nn.Module, values: dict[str, Tensor], device: torch.device) -> None:
        super().__init__()
        for name, value in values.items():
            self.register_parameter(name, nn.Parameter(value.detach().to(device, torch.float32, copy=True)))
        self.__dict__["norm"] = _without_parameters(norm)  # not a submodule: nothing in it is trained or moved

    def forward(self, x: Tensor, tuned: Any) -> Tensor:
        """The norm of x with these weights, in the dtypes of the norm's own, which is `tuned`."""
        norm: Any = self.__dict__["norm"]
        values = {name: value.to(getattr(tuned, name).dtype) for name, value in self._parameters.items()}
        if not torch.compiler.is_compiling():  # an object of this call's own: other threads have other weights
            norm, shared = object.__new__(type(norm)), norm
            norm.__dict__.update(shared.__dict__)
        for name, value in values.items():
            setattr(norm, name, value)
        output: Tensor = norm.forward(x)
        for name in values:
            delattr(norm, name)
        return output


def _without_parameters(norm: nn.Module) -> nn.Module:
    """What computes as `norm` does, once it is given parameters: no submodules, no hooks."""
    bare: nn.Module = object.__new__(type(norm))
    for name, value in norm.__dict__.items():
        bare.__dict__[name] = OrderedDict() if isinstance(value, OrderedDict) and name.endswith("hooks") else value
    for name in ("forward", "_old_forward", "_hf_hook"):  # accelerate's, about weights that are not here
        bare.__dict__.pop(name, None)
    bare._parameters, bare._modules = {}, {}
    return bare
