"""LLaMA-Adapter V2 (arXiv 2304.15010): small changes of the frozen model itself, trained along with prompts and gates."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Tuning:
    """What is trained in every linear and norm of the model, besides prompts and gates. At first it changes nothing.

    Args:
        bias: a bias behind each linear of the decoder layers (True), behind none (False), or behind those of these
            names, such as "q_proj".
        scale: "input" (the paper: y = W (x * scale) + bias), "output" (LitGPT: y = scale * (W x + bias)) or "none".
        norms: weights of their own for all norms.
        lora_rank: rank of a LoRA on every such linear, y = W x + B A x; 0: none.
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
            raise ValueError(f"bias: expected true, false or names of linears, got {self.bias!r}")
        for name, values in (("scale", ("input", "output", "none")), ("prompts", ("base", "tuned"))):
            if getattr(self, name) not in values:
                raise ValueError(f"{name}: expected {', '.join(values)}, got {getattr(self, name)!r}")
        for name in ("norms", "new_gate", "head"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}: expected true or false, got {getattr(self, name)!r}")
        if type(self.lora_rank) is not int or not 0 <= self.lora_rank <= 65536:
            raise ValueError(f"lora_rank: expected a whole number from 0 (none), got {self.lora_rank!r}")
        if not (self.bias or self.scale != "none" or self.norms or self.lora_rank or self.new_gate):
            raise ValueError("bias, scale, norms, lora_rank, new_gate: expected at least one of them, got none")
        if self.head and not (self.bias is True or self.scale != "none"):
            raise ValueError("head: expected bias or scale with it, got neither")
