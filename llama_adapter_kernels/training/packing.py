"""Optimizer steps as packed micro-batches: sequences one after the other, without padding, not seeing each other.

A step is a fixed set of examples whatever the number of processes and micro-batches, because the loss is a sum over all
response tokens of the step divided by their number: how the examples are dealt out changes rounding only.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from llama_adapter_kernels.training.data import Example


def pack(examples: Sequence[Example]) -> dict[str, Any]:
    """One packed batch as transformers models take it.

    Returns:
        input_ids, labels, position_ids: [1, T] int64, T the sum of lengths; positions restart with every sequence.
        cu_seq_lens_q, cu_seq_lens_k: [sequences + 1] int32 offsets. max_length_q, max_length_k: the longest sequence.
        media: the file that each sequence is about, or None; where any has one.
    """
    lengths = [len(example) for example in examples]
    offsets = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    media = [example.media for example in examples]
    return {
        **({"media": media} if any(media) else {}),
        "input_ids": torch.tensor([[token for example in examples for token in example.tokens]]),
        "labels": torch.tensor([[label for example in examples for label in example.labels]]),
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "cu_seq_lens_q": offsets,
        "cu_seq_lens_k": offsets,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }


def deal(examples: Sequence[Example], hands: int) -> list[list[Example]]:
    """Deals the examples out so that every hand has about as many tokens: longest first, to the shortest hand."""
    dealt: list[list[Example]] = [[] for _ in range(hands)]
    tokens = [0] * hands
    for example in sorted(examples, key=len, reverse=True):
        shortest = tokens.index(min(tokens))
        dealt[shortest].append(example)
        tokens[shortest] += len(example)
    return dealt


class StepDataset(Dataset[dict[str, Any]]):
    """Every item is one packed micro-batch; `micro_batches` items in a row make an optimizer step.

    The order of examples depends on the seed and the epoch alone: training that was interrupted goes on with the same
    batches. Set `epoch` before reading.
    """

    def __init__(self, examples: Sequence[Example], batch_size: int, micro_batches: int, seed: int) -> None:
        self.examples = examples
        self.batch_size = batch_size
        self.micro_batches = micro_batches
        self.seed = seed
        self.epoch = 0
        self._order: tuple[int, list[int]] | None = None
        self._dealt: tuple[tuple[int, int], list[list[Example]]] | None = None

    @property
    def steps(self) -> int:
        """Optimizer steps in an epoch; the last one may have fewer examples."""
        return -(-len(self.examples) // self.batch_size)

    def __len__(self) -> int:
        return self.steps * self.micro_batches

    def __getitem__(self, index: int) -> dict[str, Any]:
        step, micro_batch = divmod(index, self.micro_batches)
        if self._dealt is None or self._dealt[0] != (self.epoch, step):
            chosen = self._shuffled()[step * self.batch_size : (step + 1) * self.batch_size]
            self._dealt = (self.epoch, step), deal([self.examples[i] for i in chosen], self.micro_batches)
        # The last step may have fewer examples than micro-batches. All processes must run the model all the same.
        hand = self._dealt[1][micro_batch] or [self._dealt[1][0][0].without_labels()]
        return pack(hand)

    def _shuffled(self) -> list[int]:
        if self._order is None or self._order[0] != self.epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
            self._order = self.epoch, torch.randperm(len(self.examples), generator=generator).tolist()
        return self._order[1]


def live_positions(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Where the model predicts a response token, and which: (positions [N], tokens [N]) from labels [1, T].

    The first token of a sequence never carries a label, so that no sequence predicts into the next.
    """
    positions = (labels[0, 1:] >= 0).nonzero()[:, 0]
    return positions, labels[0, positions + 1]
