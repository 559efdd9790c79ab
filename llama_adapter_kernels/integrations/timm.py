"""timm's VisionTransformer family: ViT, DeiT, DINO, CLIP's vision towers and whatever else is made of its blocks."""

from typing import Any

from llama_adapter_kernels.integrations.architectures import Architecture, Fused, Heads


def _heads(module: Any) -> Heads:
    return Heads(module.num_heads, module.num_heads, module.head_dim)


def _module() -> type:
    from llama_adapter_kernels.integrations.timm_attention import HookedTimmAttention

    return HookedTimmAttention


ROWS: tuple[Architecture, ...] = (
    Architecture(
        "VisionTransformer", "blocks.*.attn", Fused("qkv", key_norm="k_norm"), causal=False, heads=_heads, compute=_module,
        keywords=False, kind="timm", example="timm's VisionTransformer and classes derived from it",
    ),
)  # fmt: skip
