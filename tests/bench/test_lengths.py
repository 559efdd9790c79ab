"""The sampler of sequence lengths gives the data set's published statistics."""

import torch

from llama_adapter_kernels.bench.lengths import EXAMPLES, LONGEST, alpaca_lengths


def test_statistics_of_the_data_set() -> None:
    lengths = torch.tensor(alpaca_lengths(EXAMPLES)).double()
    assert abs(lengths.sum().item() / 6.66e6 - 1) < 0.01
    assert abs(lengths.mean().item() - 128) < 1.5
    counts = torch.bincount(lengths.long()).double()
    smoothed = torch.nn.functional.avg_pool1d(counts[None, None], 15, stride=1, padding=7)[0, 0]
    assert abs(smoothed.argmax().item() - 85) <= 7
    assert 0.001 < (lengths > 400).double().mean().item() < 0.02
    assert lengths.max().item() == LONGEST
    assert lengths.min().item() >= 40
    # Padding every example to 512 wastes about three of four token slots.
    assert 0.7 < 1 - lengths.mean().item() / LONGEST < 0.8


def test_seeded() -> None:
    assert alpaca_lengths(16, seed=3) == alpaca_lengths(16, seed=3) != alpaca_lengths(16, seed=4)
