"""The architectures of transformers that take adapters, and why others cannot."""

from typing import Any

from llama_adapter_kernels.integrations.architectures import Architecture, Fused, Heads, Separate

# Where a model is made of several, the one that an adapter belongs to: paths from the model without its head, first found.
PARTS: dict[str, tuple[str, ...]] = {
    "llava": ("language_model",),
    "llava_next": ("language_model",),
    "llava_onevision": ("language_model",),
    "qwen2_vl": ("language_model",),
    "qwen2_5_vl": ("language_model",),
    "qwen3_vl": ("language_model",),
    "gemma3": ("language_model",),
    "clip": ("vision_model", "text_model"),
    "siglip": ("vision_model", "text_model"),
}

LATENT = "keys and values come from a compressed latent (MLA), there is no projection from a prompt to a key"
DISENTANGLED = "scores have terms for relative positions (disentangled attention), and a prompt has no position"
RELATIVE = "scores get a learned bias by relative position, which the fused operation does not add"
ALIBI = "scores get a bias by distance (ALiBi), which the fused operation does not add"
SOFT_CAP = "scores get a soft cap, which the fused operation does not apply"
SINKS = "softmax has attention sinks, which the fused operation does not have"
NO_ATTENTION = "its layers do not compute softmax attention"
CANNOT: dict[str, str] = {
    "deepseek_v2": LATENT, "deepseek_v3": LATENT, "minicpm3": LATENT, "longcat_flash": LATENT,
    "deberta": DISENTANGLED, "deberta-v2": DISENTANGLED,
    "t5": RELATIVE, "mt5": RELATIVE, "umt5": RELATIVE, "longt5": RELATIVE, "mpnet": RELATIVE, "swin": RELATIVE,
    "swinv2": RELATIVE, "beit": RELATIVE, "data2vec-vision": RELATIVE,
    "bloom": ALIBI, "mpt": ALIBI,
    "gemma2": SOFT_CAP, "gpt_oss": SINKS,
    "mamba": NO_ATTENTION, "mamba2": NO_ATTENTION, "rwkv": NO_ATTENTION,
}  # fmt: skip


def _soft_cap(config: Any) -> str | None:
    return SOFT_CAP if getattr(config, "attn_logit_softcapping", None) is not None else None


def _alibi(config: Any) -> str | None:
    return ALIBI if config.alibi else None


def _relative_positions(config: Any) -> str | None:
    kind = getattr(config, "position_embedding_type", None)
    return RELATIVE if isinstance(kind, str) and kind.startswith("relative") else None


def _falcon_heads(config: Any) -> Heads:
    heads = config.num_attention_heads
    if config.new_decoder_architecture:
        key = config.num_kv_heads
    else:
        key = 1 if config.multi_query else heads
    return Heads(heads, key, config.hidden_size // heads)


def _falcon_module() -> type:
    from llama_adapter_kernels.integrations.transformers.falcon import HookedFalconAttention

    return HookedFalconAttention


_DECODER, _BERT = "layers.*.self_attn", "encoder.layer.*.attention.self"
_QUERY_KEY_VALUE = Separate("key", "value")


def _decoder(
    model_type: str, example: str, attention: str = _DECODER, project: Any = None, **more: Any
) -> Architecture:
    return Architecture(model_type, attention, project or Separate(), causal=True, example=example, **more)


def _encoder(model_type: str, example: str, attention: str, project: Any = None, **more: Any) -> Architecture:
    project = project or Separate()
    return Architecture(model_type, attention, project, causal=False, kind="encoder", example=example, **more)


ROWS: tuple[Architecture, ...] = (
    _decoder("llama", "LLaMA 1 to 3, Vicuna, Alpaca, TinyLlama, SmolLM 1 and 2"),
    _decoder("mistral", "Mistral 7B"),
    _decoder("mixtral", "Mixtral 8x7B"),
    _decoder("qwen2", "Qwen 1.5, 2 and 2.5"),
    _decoder("qwen2_moe", "Qwen1.5-MoE, Qwen2-57B-A14B"),
    _decoder("qwen3", "Qwen3", project=Separate(key_norm="k_norm")),
    _decoder("qwen3_moe", "Qwen3-30B-A3B", project=Separate(key_norm="k_norm")),
    _decoder("gemma", "Gemma 1"),
    _decoder("gemma3_text", "Gemma 3", project=Separate(key_norm="k_norm"), refuse=_soft_cap),
    _decoder("phi", "Phi-1, Phi-1.5, Phi-2", project=Separate(key_norm="k_layernorm")),
    _decoder("phi3", "Phi-3, Phi-4", project=Fused("qkv_proj")),
    _decoder("olmo2", "OLMo 2", project=Separate(key_norm="k_norm", norm_over="width")),
    _decoder("smollm3", "SmolLM3"),
    _decoder("granite", "Granite 3"),
    _decoder("stablelm", "StableLM 2", project=Separate(key_norm="k_layernorm")),
    _decoder("cohere2", "Command R7B"),
    _decoder("gpt2", "GPT-2, DistilGPT2", "h.*.attn", Fused("c_attn")),
    _decoder("gpt_neox", "Pythia, GPT-NeoX", "layers.*.attention", Fused("query_key_value", "groups")),
    _decoder("opt", "OPT", "decoder.layers.*.self_attn"),
    _decoder(
        "falcon", "Falcon 7B, 40B, 180B", "h.*.self_attention", Fused("query_key_value", "groups"), heads=_falcon_heads,
        refuse=_alibi, compute=_falcon_module, keywords=False,
    ),
    _decoder("qwen2_vl_text", "language part of Qwen2-VL", kind="part"),
    _decoder("qwen2_5_vl_text", "language part of Qwen2.5-VL", kind="part"),
    _decoder("qwen3_vl_text", "language part of Qwen3-VL", project=Separate(key_norm="k_norm"), kind="part"),
    _encoder("bert", "BERT, MiniLM", _BERT, _QUERY_KEY_VALUE, refuse=_relative_positions),
    _encoder("roberta", "RoBERTa", _BERT, _QUERY_KEY_VALUE, refuse=_relative_positions),
    _encoder("xlm-roberta", "XLM-R", _BERT, _QUERY_KEY_VALUE, refuse=_relative_positions),
    _encoder("electra", "ELECTRA", _BERT, _QUERY_KEY_VALUE, refuse=_relative_positions),
    _encoder("distilbert", "DistilBERT", "transformer.layer.*.attention", Separate("k_lin", "v_lin")),
    _encoder("modernbert", "ModernBERT", "layers.*.attn", Fused("Wqkv")),
    _encoder("vit", "ViT", "layers.*.attention"),
    _encoder("deit", "DeiT", "layers.*.attention"),
    _encoder("dinov2", "DINOv2", "encoder.layer.*.attention"),
    _encoder("siglip_vision_model", "SigLIP's vision tower", "encoder.layers.*.self_attn", keywords=False),
    _encoder("siglip_text_model", "SigLIP's text tower", "encoder.layers.*.self_attn", keywords=False),
    _encoder("clip_vision_model", "CLIP's vision tower", "encoder.layers.*.self_attn"),
    Architecture(
        "clip_text_model", "encoder.layers.*.self_attn", Separate(), causal=True, kind="encoder", example="CLIP's text tower"
    ),
    _encoder("whisper", "Whisper's encoder", "layers.*.self_attn", stem="encoder"),
)  # fmt: skip
