"""Frozen encoders of images and sound, and the views of their features that conditioning modules take."""

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool1d

from llama_adapter_kernels.errors import UserError
from llama_adapter_kernels.media.audio import read_audio
from llama_adapter_kernels.media.image import read_image

log = logging.getLogger(__name__)

AUDIO_TOKENS = 64  # a sound of any length becomes so many tokens
VIEWS = ("multi_scale", "tokens", "pooled", "layer_means")


class Encoder(Protocol):
    """A frozen encoder."""

    name: str
    modality: str
    width: int
    layers: int

    def width_of(self, view: str) -> int:
        """The last dimension of a view."""
        ...

    def encode(self, path: Path, view: str, depths: int = 1, where: str = "") -> Tensor:
        """The features of one file in one view, without a batch dimension, float32 on the CPU.

        multi_scale: [depths, width] from layers spread evenly up to the last; layer_means: [layers + 1, width];
        tokens: [T, width]; pooled: [width].
        """
        ...

    def encode_many(self, paths: Sequence[Path], view: str, depths: int, wheres: Sequence[str]) -> list[Tensor]:
        """As `encode`, for several files at a time."""
        ...

    def fingerprint(self) -> str:
        """Equal for encoders that give equal features."""
        ...


def load_encoder(name: str, modality: str, device: str = "cpu") -> Encoder:
    """An encoder from a Hugging Face folder or hub name; "log-mel" is a spectrogram, which needs no network.

    Raises:
        UserError: there is no such model, or it is for another modality.
    """
    if modality == "audio" and name == "log-mel":
        from llama_adapter_kernels.media.log_mel import LogMel

        return LogMel()
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(name)
        if modality == "image":
            model = _vision_model(transformers, name, config)
            processor = transformers.AutoImageProcessor.from_pretrained(name, backend="pil")
            return VisionEncoder(name, model.to(device), processor)
        model = transformers.AutoModel.from_pretrained(name)
        if model.main_input_name not in ("input_values", "input_features"):
            raise ValueError(f"expected an audio model, got one of type {config.model_type}")
        extractor = transformers.AutoFeatureExtractor.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"--{modality}-encoder {name}: {str(error).strip().partition(chr(10))[0]}") from error
    is_whisper = config.model_type.startswith("whisper")
    return AudioEncoder(name, (model.encoder if is_whisper else model).to(device), extractor)


class VisionEncoder:
    """A transformers vision tower: CLIP, SigLIP, DINOv2, ViT and their kin."""

    modality = "image"

    def __init__(self, name: str, model: Any, processor: Any) -> None:
        self.name, self.model, self.processor = name, model.eval().requires_grad_(False), processor
        config = getattr(model.config, "vision_config", None) or model.config
        self.layers = int(config.num_hidden_layers)
        self.width = int(config.hidden_size)
        self.projection = getattr(model, "visual_projection", None)
        tower = getattr(model, "vision_model", model)
        # CLIP norms the class token only, for its pooled output; the tokens of the official adapters are normed, too.
        self.final_norm = getattr(tower, "post_layernorm", None) if "clip" in config.model_type else None
        self.has_class_token = "siglip" not in config.model_type

    def width_of(self, view: str) -> int:
        """The last dimension of a view: CLIP's projection changes that of tokens and pooled."""
        projected = self.projection is not None and view in ("tokens", "pooled")
        return int(self.projection.out_features) if projected and self.projection is not None else self.width

    @torch.inference_mode()
    def encode(self, path: Path, view: str, depths: int = 1, where: str = "") -> Tensor:
        return self.encode_images([read_image(path, where)], view, depths)[0]

    def encode_many(self, paths: Sequence[Path], view: str, depths: int, wheres: Sequence[str]) -> list[Tensor]:
        images = [read_image(path, where) for path, where in zip(paths, wheres, strict=True)]
        return list(self.encode_images(images, view, depths))

    @torch.inference_mode()
    def encode_images(self, images: Sequence[Any], view: str, depths: int = 1) -> Tensor:
        """The features of several PIL images, with a batch dimension."""
        pixels = self.processor(images=list(images), return_tensors="pt")["pixel_values"].to(self.model.device)
        found = self.model(pixel_values=pixels.to(self.model.dtype), output_hidden_states=True)
        last = found.last_hidden_state
        if view == "tokens":
            tokens = last if self.final_norm is None else self.final_norm(last)
            result = tokens if self.projection is None else self.projection(tokens)
        elif view == "pooled":
            result = getattr(found, "image_embeds", None)
            if result is None:
                result = getattr(found, "pooler_output", None)
            if result is None:
                result = self._global(last)
        elif view == "multi_scale":
            hidden = found.hidden_states
            result = torch.stack([self._global(hidden[number]) for number in spread(self.layers, depths)], dim=1)
        else:
            raise ValueError(f"view: expected multi_scale, tokens or pooled for an image, got {view!r}")
        return result.float().cpu()

    def fingerprint(self) -> str:
        return fingerprint_of(self.model)

    def _global(self, states: Tensor) -> Tensor:
        return states[:, 0] if self.has_class_token else states.mean(1)


class AudioEncoder:
    """A transformers audio encoder: Wav2Vec2, HuBERT (MERT's architecture), Whisper's encoder and their kin."""

    modality = "audio"
    WINDOW_SECONDS = 30.0  # Whisper's input; longer sounds are heard in windows of equal weight per second

    def __init__(self, name: str, model: Any, extractor: Any) -> None:
        self.name, self.model, self.extractor = name, model.eval().requires_grad_(False), extractor
        self.rate = int(extractor.sampling_rate)
        config = model.config
        self.layers = int(getattr(config, "encoder_layers", None) or config.num_hidden_layers)
        self.width = int(getattr(config, "d_model", None) or config.hidden_size)

    def width_of(self, view: str) -> int:
        return self.width

    @torch.inference_mode()
    def encode(self, path: Path, view: str, depths: int = 1, where: str = "") -> Tensor:
        samples = read_audio(path, self.rate, where)
        size = int(self.WINDOW_SECONDS * self.rate)
        windows = [samples[start : start + size] for start in range(0, len(samples), size)]
        if len(windows) > 1 and len(windows[-1]) < self.rate // 10:
            windows.pop()  # a rest of less than a tenth of a second
        heard = [self._hidden_states(window) for window in windows]  # each [layers + 1, T, width]
        means = torch.cat(heard, dim=1).mean(1)
        if view == "layer_means":
            result = means
        elif view == "multi_scale":
            result = means[spread(self.layers, depths)]
        elif view == "pooled":
            result = means[-1]
        elif view == "tokens":
            last = torch.cat(heard, dim=1)[-1]
            result = adaptive_avg_pool1d(last.T, AUDIO_TOKENS).T
        else:
            raise ValueError(f"view: expected one of {', '.join(VIEWS)}, got {view!r}")
        return result.float().cpu().contiguous()

    def encode_many(self, paths: Sequence[Path], view: str, depths: int, wheres: Sequence[str]) -> list[Tensor]:
        # One by one: padding to a common length would change what convolutions and attention hear.
        return [self.encode(path, view, depths, where) for path, where in zip(paths, wheres, strict=True)]

    def fingerprint(self) -> str:
        return fingerprint_of(self.model)

    def _hidden_states(self, samples: Any) -> Tensor:
        inputs = self.extractor(samples, sampling_rate=self.rate, return_tensors="pt")
        if "input_features" in inputs:  # Whisper: always 30 seconds of spectrogram, of which only the sound counts
            found = self.model(inputs["input_features"].to(self.model.device), output_hidden_states=True)
            states = torch.cat(found.hidden_states)
            live = max(1, round(len(samples) / (self.WINDOW_SECONDS * self.rate) * states.shape[1]))
            return states[:, :live]
        values = inputs["input_values"].to(self.model.device)
        shortest = 400  # the receptive field of the convolutions of Wav2Vec2's family
        if values.shape[1] < shortest:
            values = torch.nn.functional.pad(values, (0, shortest - values.shape[1]))
        return torch.cat(self.model(values, output_hidden_states=True).hidden_states)


def spread(layers: int, depths: int) -> list[int]:
    """Numbers of `depths` hidden states, evenly spaced and ending with the last layer's.

    Raises:
        ValueError: more depths than layers.
    """
    if not 1 <= depths <= layers:
        raise ValueError(f"depths: expected 1 to {layers} (the encoder's layers), got {depths}")
    return [layers * (index + 1) // depths for index in range(depths)]


def fingerprint_of(model: Any) -> str:
    """A digest of a model's configuration and of a few numbers of every weight."""
    digest = hashlib.sha256(json.dumps(model.config.to_dict(), sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().float().cpu().flatten()
        digest.update(name.encode() + flat[:: max(1, flat.numel() // 16)].numpy().tobytes())
    return digest.hexdigest()[:16]


def _vision_model(transformers: Any, name: str, config: Any) -> Any:
    """The vision half of a model; CLIP's with its projection."""
    if config.model_type in ("clip", "clip_vision_model"):
        return transformers.CLIPVisionModelWithProjection.from_pretrained(name)
    if config.model_type in ("siglip", "siglip_vision_model"):
        return transformers.SiglipVisionModel.from_pretrained(name)
    model = transformers.AutoModel.from_pretrained(name)
    if model.main_input_name != "pixel_values":
        raise ValueError(f"expected a vision model, got one of type {config.model_type}")
    return model
