"""Adapter files as other projects write them, with random open gates, and importing them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import llama_adapter_kernels as lak
from tests.support.eager_llama import FFN, HEADS, HIDDEN, LAYERS

PROMPTS = 5


@contextmanager
def imported(model: nn.Module, path: Path, **choices: Any) -> Iterator[lak.ZeroGateAdapter]:
    """The adapter of a file on the model."""
    adapter = lak.load_adapter(model, path, **choices)
    try:
        yield adapter
    finally:
        lak.detach_adapter(model)


def v1_file(adapted: int = 2) -> dict[str, Tensor]:
    """Official V1: prompts of the last layers, gates of all, those without prompts still 0."""
    torch.manual_seed(1)
    gates = {
        f"layers.{n}.attention.gate": torch.randn(1, HEADS, 1, 1) * (n >= LAYERS - adapted) for n in range(LAYERS)
    }  # fmt: skip
    return gates | {"adapter_query.weight": torch.randn(adapted * PROMPTS, HIDDEN)}


def named(prefix: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Random tensors; norm weights and scales around 1."""
    found = {}
    for name, shape in shapes.items():
        around = 1.0 if "norm.weight" in name or name.endswith("_scale") else 0.0
        found[prefix + name] = around + 0.3 * torch.randn(shape)
    return found


def norm_shapes() -> dict[str, tuple[int, ...]]:
    layers = {f"layers.{n}.{kind}.weight": (HIDDEN,) for n in range(LAYERS) for kind in ("attention_norm", "ffn_norm")}
    return layers | {"norm.weight": (HIDDEN,)}


LINEARS = {
    "attention.wq": (HIDDEN, HIDDEN), "attention.wk": (HIDDEN, HIDDEN), "attention.wv": (HIDDEN, HIDDEN),
    "attention.wo": (HIDDEN, HIDDEN), "feed_forward.w1": (FFN, HIDDEN), "feed_forward.w2": (HIDDEN, FFN),
    "feed_forward.w3": (FFN, HIDDEN),
}  # fmt: skip


def chat_file() -> dict[str, Tensor]:
    """Official V2 chat: scales of inputs, biases, norms; no prompts."""
    torch.manual_seed(2)
    shapes = norm_shapes()
    for n in range(LAYERS):
        for name, (out, inputs) in LINEARS.items():
            shapes |= {f"layers.{n}.{name}_bias": (out,), f"layers.{n}.{name}_scale": (inputs,)}
    return named("", shapes)


def multimodal_file(lora: int = 0, prefix: str = "llama.", prompts: int = PROMPTS) -> dict[str, Tensor]:
    """Official V2 multimodal: prompts of all layers but the lowest, biases of some linears, norms, visual parts."""
    torch.manual_seed(3)
    shapes = norm_shapes()
    for n in range(LAYERS):
        shapes[f"layers.{n}.attention.gate"] = (1, HEADS, 1, 1)
        for name, (out, inputs) in LINEARS.items():
            part, _, linear = name.partition(".")
            if linear not in ("wk", "wv"):
                shapes[f"layers.{n}.{name}.bias"] = (out,)
            if lora:
                shapes[f"layers.{n}.{part}.lora_{linear}_l1.weight"] = (lora, inputs)
                shapes[f"layers.{n}.{part}.lora_{linear}_l2.weight"] = (out, lora)
        if lora:
            shapes[f"layers.{n}.attention.new_gate"] = (1, 1, 1, 1)
    found = named(prefix, shapes)
    found[f"{prefix}layers.0.attention.gate"].zero_()
    visual = {
        "visual_query.weight": (prompts, 16), "clip_proj.weight": (16, 12), "clip_proj.bias": (16,),
        "clip_proj_norm.weight": (16,), "clip_proj_norm.bias": (16,), "visual_proj.weight": (HIDDEN, 16),
        "visual_proj.bias": (HIDDEN,), "visual_proj_norm.weight": (HIDDEN,), "visual_proj_norm.bias": (HIDDEN,),
        "adapter_query.weight": ((LAYERS - 1) * prompts, HIDDEN),
    }  # fmt: skip
    return found | named("", visual)


def one_prompt_file(kind: str, layers: int) -> dict[str, Tensor]:
    """ImageBind-LLM (all layers) or MU-LLaMA (the last): one prompt each, to which an embedding is added."""
    torch.manual_seed(4)
    shapes = norm_shapes() | {f"layers.{n}.attention.gate": (1, HEADS, 1, 1) for n in range(LAYERS)}
    parts = {"imagebind-llm": "image_bind_", "mu-llama": "mu_mert_"}
    refine = {f"{parts[kind]}proj.weight": (HIDDEN, 12), f"{parts[kind]}norm_1.weight": (HIDDEN,)}
    return named("llama.", shapes) | named("", refine | {"prefix_query.weight": (layers, HIDDEN)})


def accessory_file(layers: int, new_gate: bool, tuned: bool, prefix: str = "") -> dict[str, Tensor]:
    """LLaMA2-Accessory: prompts and gates in one tensor each; perhaps norms, biases, a LoRA."""
    torch.manual_seed(5)
    shapes: dict[str, tuple[int, ...]] = {"prefix": (layers, 1, PROMPTS, HIDDEN), "prefix_gate": (layers, HEADS)}
    if new_gate:
        shapes["prefix_new_gate"] = (layers,)
    if tuned:
        shapes |= norm_shapes()
        for n in range(LAYERS):
            for name, (out, inputs) in LINEARS.items():
                at = f"layers.{n}.{name}"
                shapes |= {f"{at}.bias": (out,), f"{at}.lora_a.weight": (2, inputs), f"{at}.lora_b.weight": (out, 2)}
    found = named(prefix, shapes)
    return {
        name: 4 * value if name.removeprefix(prefix).startswith("prefix") else value for name, value in found.items()
    }
