"""Small random encoders of images and sound, as Hugging Face folders."""

from pathlib import Path

import torch
import transformers

VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 16,
          "patch_size": 8}  # fmt: skip
SPEECH = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2,
          "conv_dim": [16, 16], "conv_kernel": [10, 8], "conv_stride": [5, 4], "num_feat_extract_layers": 2,
          "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}  # fmt: skip


def save_vision(folder: Path, kind: str) -> Path:
    torch.manual_seed(3)
    models = {
        "clip": lambda: transformers.CLIPVisionModelWithProjection(
            transformers.CLIPVisionConfig(**VISION, projection_dim=24)
        ),
        "vit": lambda: transformers.ViTModel(transformers.ViTConfig(**VISION)),
        "dinov2": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**VISION)),
        "siglip": lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**VISION)),
    }
    models[kind]().save_pretrained(folder)
    processor = transformers.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor.save_pretrained(folder)
    return folder


def save_audio(folder: Path, kind: str) -> Path:
    torch.manual_seed(3)
    if kind == "whisper":
        config = transformers.WhisperConfig(
            d_model=32, encoder_layers=3, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
            encoder_ffn_dim=48, decoder_ffn_dim=48, vocab_size=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            decoder_start_token_id=1,
        )  # fmt: skip
        transformers.WhisperModel(config).save_pretrained(folder)
        transformers.WhisperFeatureExtractor().save_pretrained(folder)
        return folder
    family = {"wav2vec2": (transformers.Wav2Vec2Config, transformers.Wav2Vec2Model),
              "hubert": (transformers.HubertConfig, transformers.HubertModel)}  # fmt: skip
    config_class, model_class = family[kind]
    model_class(config_class(**SPEECH)).save_pretrained(folder)
    transformers.Wav2Vec2FeatureExtractor().save_pretrained(folder)
    return folder
