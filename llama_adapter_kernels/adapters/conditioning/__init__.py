"""Prompts that depend on an image or a sound: modules from the features of a frozen encoder to prompts of every layer.

A module takes features and returns prompts [B, P, hidden] for all adapted layers, or [B, L, P, hidden], which are added to
the learned ones of each sequence. Which features it wants is its `view`:

    multi_scale  [B, N, width]     one global vector from each of N depths of a vision encoder
    tokens       [B, T, width]     every token of the last layer
    pooled       [B, width]        one vector, the encoder's own summary
    layer_means  [B, N, width]     the mean over time of every hidden state of an audio encoder
"""

from llama_adapter_kernels.adapters.conditioning.config import ConditioningConfig, build_conditioning

__all__ = ["ConditioningConfig", "build_conditioning"]
