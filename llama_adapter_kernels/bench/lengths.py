"""Sequence lengths of the Alpaca data set, without the data set.

The 52,002 examples have 6.66 M tokens with their prompt template (mean 128, mode about 85, few over 400; training cuts
at 512). A log-normal over the tokens that every template needs reproduces this; its two parameters follow from the mean
and the mode: mode = floor + exp(mu - sigma^2), mean = floor + exp(mu + sigma^2 / 2).
"""

import math

import torch

EXAMPLES = 52_002
LONGEST = 512
_TEMPLATE = 40  # tokens of the template and the shortest instruction
_MEAN, _MODE = 128.4, 85.0  # the mean before the cut at LONGEST, which takes 0.3 tokens
_SIGMA_SQUARED = math.log((_MEAN - _TEMPLATE) / (_MODE - _TEMPLATE)) / 1.5
_MU = math.log(_MODE - _TEMPLATE) + _SIGMA_SQUARED


def alpaca_lengths(count: int, seed: int = 0) -> tuple[int, ...]:
    """`count` sequence lengths in tokens, prompt and answer together; the same ones for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(count, generator=generator, dtype=torch.float64)
    lengths = _TEMPLATE + torch.exp(_MU + math.sqrt(_SIGMA_SQUARED) * normal)
    return tuple(lengths.round().clamp(max=LONGEST).long().tolist())
