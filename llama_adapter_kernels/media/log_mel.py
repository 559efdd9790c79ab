"""A spectrogram in place of an encoder: for small models and demonstrations, where no network is to be downloaded."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool1d

from llama_adapter_kernels.media.audio import read_audio

BANDS, FRAME, HOP = 64, 400, 160  # 25 ms windows every 10 ms at 16 kHz
POSITIONS = 16


class LogMel:
    """Log-mel frames, normalised per sound, in patches.

    tokens: [32, 80], 64 bands and the position in time as 16 sines and cosines, which an encoder would know by itself;
    pooled: [64], the mean over time; multi_scale and layer_means: [depths, 64], the means of `depths` stretches of the sound
    in their order, since there are no layers.
    """

    name, modality, width, layers = "log-mel", "audio", BANDS, 32
    rate = 16000

    def width_of(self, view: str) -> int:
        return BANDS + POSITIONS if view == "tokens" else BANDS

    def encode(self, path: Path, view: str, depths: int = 1, where: str = "") -> Tensor:
        frames = self.frames(read_audio(path, self.rate, where))
        if view == "pooled":
            return frames.mean(0)
        if view == "tokens":
            depths = self.layers
        elif view not in ("multi_scale", "layer_means"):
            raise ValueError(f"view: expected multi_scale, layer_means, tokens or pooled, got {view!r}")
        stretches = adaptive_avg_pool1d(frames.T[None], depths)[0].T.contiguous()
        return torch.cat([stretches, _positions(depths)], dim=1) if view == "tokens" else stretches

    def encode_many(self, paths: Sequence[Path], view: str, depths: int, wheres: Sequence[str]) -> list[Tensor]:
        return [self.encode(path, view, depths, where) for path, where in zip(paths, wheres, strict=True)]

    def frames(self, samples: object) -> Tensor:
        """[T, bands] float32, mean 0 and variance 1 over the sound."""
        import numpy as np
        from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

        waveform = np.asarray(samples)
        if len(waveform) < FRAME:
            waveform = np.pad(waveform, (0, FRAME - len(waveform)))
        filters = mel_filter_bank(FRAME // 2 + 1, BANDS, 20.0, 8000.0, self.rate, norm="slaney", mel_scale="slaney")
        mel = spectrogram(
            waveform, window_function(FRAME, "hann"), FRAME, HOP, power=2.0, mel_filters=filters, log_mel="log10"
        )
        values = torch.from_numpy(mel.T).float()
        return (values - values.mean()) / (values.std() + 1e-5)

    def fingerprint(self) -> str:
        return f"log-mel-{BANDS}-{FRAME}-{HOP}"


def _positions(length: int) -> Tensor:
    """[length, POSITIONS]: sines and cosines of the relative time, from a quarter of a period upwards in octaves."""
    angles = torch.arange(length)[:, None] / length * (math.pi / 2 * 2.0 ** torch.arange(POSITIONS // 2))
    return torch.cat([angles.sin(), angles.cos()], dim=1)
