"""A small random model of every architecture that takes adapters, and what to feed it."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

HIDDEN, LAYERS, HEADS, VOCABULARY, LENGTH = 32, 2, 4, 64, 9
WORDS = {
    "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUPED = WORDS | {"num_key_value_heads": 2}
IMAGE = {
    "image_size": 16, "patch_size": 8, "hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
}  # fmt: skip


@dataclass(frozen=True)
class Example:
    """One kind of model.

    Attributes:
        model_type: of the part that is adapted.
        make: builds it, randomly initialised, with a head.
        task: "generate", "words" (classes of texts), "pixels" (classes of pictures) or "sound" (classes of sounds).
        outer: path to the adapted part where the whole model takes no adapter itself.
    """

    model_type: str
    make: Callable[[], nn.Module]
    task: str
    outer: str = ""


EXAMPLES: dict[str, Example] = {}


def _add(name: str, task: str, config: Any, model: Any = None, outer: str = "") -> None:
    """`name` begins with the model_type. `model`: a class, or None for the one that transformers finds."""
    classes = {"generate": hf.AutoModelForCausalLM, "words": hf.AutoModelForSequenceClassification}
    make = (lambda: model(config)) if model is not None else (lambda: classes[task].from_config(config))
    EXAMPLES[name] = Example(name.partition(" ")[0], make, task, outer)


def _decoders() -> None:
    half = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}}
    layers = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
    experts = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
    gpt2 = {"vocab_size": VOCABULARY, "n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 64,
            "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "attn_pdrop": 0.0}  # fmt: skip
    opt = {name: value for name, value in WORDS.items() if name != "intermediate_size"} | {"ffn_dim": 48}
    falcon = WORDS | {"alibi": False, "num_kv_heads": 2}
    for name, config in (
        ("llama", hf.LlamaConfig(**GROUPED)),
        ("llama with biases", hf.LlamaConfig(**GROUPED, attention_bias=True)),
        ("mistral with a window", hf.MistralConfig(**GROUPED, sliding_window=5)),
        ("mixtral", hf.MixtralConfig(**GROUPED, num_local_experts=4)),
        ("qwen2", hf.Qwen2Config(**GROUPED)),
        ("qwen2_moe", hf.Qwen2MoeConfig(**GROUPED, **experts, num_experts=4, shared_expert_intermediate_size=16)),
        ("qwen3", hf.Qwen3Config(**GROUPED, head_dim=12)),
        ("qwen3_moe", hf.Qwen3MoeConfig(**GROUPED, **experts, num_local_experts=4, head_dim=12)),
        ("gemma", hf.GemmaConfig(**GROUPED, head_dim=12)),
        ("gemma3_text with a window", hf.Gemma3TextConfig(**GROUPED, **layers, head_dim=12)),
        ("phi", hf.PhiConfig(**GROUPED)),
        ("phi with norms", hf.PhiConfig(**WORDS, qk_layernorm=True)),
        ("phi3", hf.Phi3Config(**GROUPED)),
        ("olmo2", hf.Olmo2Config(**GROUPED)),
        ("smollm3", hf.SmolLM3Config(**GROUPED)),
        ("granite", hf.GraniteConfig(**GROUPED, attention_multiplier=0.2)),
        ("stablelm", hf.StableLmConfig(**GROUPED, **half, use_qkv_bias=True)),
        ("stablelm with norms", hf.StableLmConfig(**GROUPED, **half, qk_layernorm=True)),
        ("cohere2", hf.Cohere2Config(**GROUPED, sliding_window=5)),
        ("gpt2", hf.GPT2Config(**gpt2)),
        ("gpt2 scaled by layer", hf.GPT2Config(**gpt2, scale_attn_by_inverse_layer_idx=True)),
        ("gpt_neox", hf.GPTNeoXConfig(**WORDS)),
        ("opt", hf.OPTConfig(**opt, word_embed_proj_dim=HIDDEN, attention_dropout=0.0)),
        ("falcon", hf.FalconConfig(**falcon, new_decoder_architecture=True)),
        ("falcon with one key head", hf.FalconConfig(**falcon, multi_query=True)),
        (
            "falcon with all key heads",
            hf.FalconConfig(**falcon | {"num_kv_heads": HEADS}, multi_query=False, bias=True),
        ),
    ):
        _add(name, "generate", config)


def _language_parts() -> None:
    llava = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**IMAGE), text_config=hf.LlamaConfig(**GROUPED), image_token_index=63,
        vision_feature_layer=-1,
    )  # fmt: skip
    _add("llama of llava", "generate", llava, hf.LlavaForConditionalGeneration)
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    text = GROUPED | {"rope_parameters": rope}
    vision = {"depth": 1, "patch_size": 4, "spatial_merge_size": 1, "temporal_patch_size": 1, "hidden_size": HIDDEN,
              "num_heads": 2}  # fmt: skip
    two = hf.Qwen2VLConfig(text_config=text, vision_config=vision | {"embed_dim": HIDDEN})
    _add("qwen2_vl_text", "generate", two, hf.Qwen2VLForConditionalGeneration)
    vision |= {"out_hidden_size": HIDDEN, "intermediate_size": 32}
    half = hf.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    _add("qwen2_5_vl_text", "generate", half, hf.Qwen2_5_VLForConditionalGeneration)
    vision |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    three = hf.Qwen3VLConfig(text_config=text | {"head_dim": 8}, vision_config=vision)
    _add("qwen3_vl_text", "generate", three, hf.Qwen3VLForConditionalGeneration)


def _encoders() -> None:
    quiet = WORDS | {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}
    distilbert = hf.DistilBertConfig(
        vocab_size=VOCABULARY, dim=HIDDEN, n_layers=LAYERS, n_heads=HEADS, hidden_dim=48, attention_dropout=0.0,
        dropout=0.0, seq_classif_dropout=0.0,
    )  # fmt: skip
    modernbert = hf.ModernBertConfig(**WORDS, cls_token_id=1, sep_token_id=2, local_attention=6)
    for name, config in (
        ("bert", hf.BertConfig(**quiet)), ("roberta", hf.RobertaConfig(**quiet)),
        ("xlm-roberta", hf.XLMRobertaConfig(**quiet)), ("electra", hf.ElectraConfig(**quiet, embedding_size=24)),
        ("distilbert", distilbert), ("modernbert with a window", modernbert),
    ):  # fmt: skip
        _add(name, "words", config)
    clip = hf.CLIPConfig(text_config=WORDS, vision_config=IMAGE)
    siglip = hf.SiglipConfig(text_config=WORDS, vision_config=IMAGE)
    _add("vit", "pixels", hf.ViTConfig(**IMAGE), hf.ViTForImageClassification)
    _add("deit", "pixels", hf.DeiTConfig(**IMAGE), hf.DeiTForImageClassification)
    _add("dinov2", "pixels", hf.Dinov2Config(**IMAGE), hf.Dinov2ForImageClassification)
    _add("siglip_vision_model", "pixels", siglip, hf.SiglipForImageClassification)
    _add("siglip_text_model", "words", siglip, hf.SiglipModel, outer="text_model")
    _add("clip_vision_model", "pixels", clip, hf.CLIPForImageClassification)
    _add("clip_text_model", "words", hf.CLIPTextConfig(**WORDS), hf.CLIPTextModelWithProjection)
    whisper = hf.WhisperConfig(
        vocab_size=VOCABULARY, d_model=HIDDEN, encoder_layers=LAYERS, decoder_layers=1, encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS, encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=8, max_source_positions=16,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, num_labels=3,
    )  # fmt: skip
    _add("whisper", "sound", whisper, hf.WhisperForAudioClassification)


_decoders()
_language_parts()
_encoders()


@cache
def _made(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = EXAMPLES[name].make().eval().requires_grad_(True)
    for parameter in model.parameters():  # biases and norms start as nothing, weights as little: make them count
        parameter.data = parameter * 3 if parameter.dim() > 1 else parameter + 0.1 * torch.randn_like(parameter)
    return model


def build(name: str) -> tuple[nn.Module, nn.Module]:
    """(a model of its own, the part of it that takes the adapter)."""
    model = copy.deepcopy(_made(name))
    part = model
    for step in filter(None, EXAMPLES[name].outer.split(".")):
        part = getattr(part, step)
    return model, part


def inputs(name: str, rows: int = 2) -> dict[str, Tensor]:
    """A batch without padding."""
    made = torch.Generator().manual_seed(1)
    task = EXAMPLES[name].task
    if task == "pixels":
        return {"pixel_values": torch.randn(rows, 3, 16, 16, generator=made)}
    if task == "sound":
        return {"input_features": torch.randn(rows, 8, 32, generator=made)}
    return {"input_ids": torch.randint(3, VOCABULARY - 2, (rows, LENGTH), generator=made)}


def answer(part: nn.Module, **batch: Tensor) -> Tensor:
    """What the adapted part says: logits, or its last hidden states."""
    output = part(**batch)
    return output.logits if "logits" in output else output[0]
