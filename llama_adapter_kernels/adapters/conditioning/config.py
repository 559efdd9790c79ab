"""Which conditioning module an adapter has, and how large it is: saved with the adapter."""

from dataclasses import dataclass, fields

from torch import nn

from llama_adapter_kernels.adapters.conditioning.multi_scale import MultiScalePrompt
from llama_adapter_kernels.adapters.conditioning.queries import QueryPrompt
from llama_adapter_kernels.adapters.conditioning.swiglu import LayerMeansPrompt, PooledPrompt

KINDS = ("multi_scale", "queries", "imagebind", "mu_llama")


@dataclass(frozen=True)
class ConditioningConfig:
    """A module from encoder features to prompts.

    Args:
        kind: "multi_scale" (the paper), "queries" (LLaMA-Adapter V2 multimodal), "imagebind" (ImageBind-LLM) or
            "mu_llama" (MU-LLaMA).
        width: of the encoder's features.
        hidden_size: of the language model.
        prefix_length: P, slots of the prompts: those of the adapter.
        depths: N, how many of the encoder's layers give features (multi_scale, mu_llama).
        inner_size: of the transformer blocks (queries) or the SwiGLU blocks (imagebind, mu_llama); None: as published,
            768 and 4 hidden_size.
        blocks: transformer or SwiGLU blocks; None: as published, 8 and 3.
        heads: of the transformer blocks.
        fusion: "all" adds the prompts to every adapted layer; "early" (LLaMA-Adapter V2) gives them to the first adapted
            layer alone, which has no learned prompt then, so that they do not meet the learned ones of the last layers.
        encoder: where the encoder comes from, a folder or hub name; for whoever loads the adapter.
        modality: "image" or "audio".

    Raises:
        ValueError: a field is out of range.
    """

    kind: str
    width: int
    hidden_size: int
    prefix_length: int = 10
    depths: int = 1
    inner_size: int | None = None
    blocks: int | None = None
    heads: int = 16
    fusion: str = "all"
    encoder: str = ""
    modality: str = "image"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.modality not in ("image", "audio"):
            raise ValueError(f"modality: expected image or audio, got {self.modality!r}")
        if self.fusion not in ("all", "early"):
            raise ValueError(f"fusion: expected all or early, got {self.fusion!r}")
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in ("kind", "fusion", "encoder", "modality"):
                if not isinstance(value, str):
                    raise ValueError(f"{field.name}: expected text, got {value!r}")
                continue
            if value is None and field.default is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{field.name}: expected a whole number of at least 1, got {value!r}")
        if self.kind == "queries" and (self.inner_size or 768) % self.heads != 0:
            raise ValueError(f"heads: expected a divisor of inner_size {self.inner_size or 768}, got {self.heads}")

    @property
    def view(self) -> str:
        """The features that the module takes; see the package's docstring."""
        views = {"multi_scale": "multi_scale", "queries": "tokens", "imagebind": "pooled", "mu_llama": "layer_means"}
        return views[self.kind]


def build_conditioning(config: ConditioningConfig) -> nn.Module:
    """The module of `config`, freshly initialised."""
    if config.kind == "multi_scale":
        return MultiScalePrompt(config.width, config.depths, config.hidden_size, config.prefix_length)
    if config.kind == "queries":
        return QueryPrompt(
            config.width, config.hidden_size, config.prefix_length, config.inner_size or 768, config.blocks or 8,
            config.heads,
        )  # fmt: skip
    inner, blocks = config.inner_size or 4 * config.hidden_size, config.blocks or 3
    if config.kind == "imagebind":
        return PooledPrompt(config.width, config.hidden_size, config.prefix_length, inner, blocks)
    return LayerMeansPrompt(config.width, config.depths, config.hidden_size, config.prefix_length, inner, blocks)
