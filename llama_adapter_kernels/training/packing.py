"""Optimizer steps as packed micro-batches: sequences one after the other, without padding, not seeing each other.

A step is a fixed set of examples whatever the number of processes and micro-batches, because the loss is a sum over all
response tokens of the step divided by their number: how the examples are dealt out changes rounding only.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from llama_adapter_kernels.training.tokens import Example

_LOOK_AHEAD = 64  # among so many of the next examples a bin looks for what fills it
_MOST_BINS = 64
_LEAST = 2  # a bin's tokens over those of the longest example


def pack(examples: Sequence[Example], longest: int | None = None) -> dict[str, Any]:
    """One packed batch as transformers models take it.

    Args:
        longest: what to give as the length of the longest sequence, no less than it; None: just that.

    Returns:
        input_ids, labels, position_ids: [1, T] int64, T the sum of lengths; positions restart with every sequence.
        cu_seq_lens_q, cu_seq_lens_k: [sequences + 1] int32 offsets. max_length_q, max_length_k: `longest`.
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
        "max_length_q": longest or max(lengths),
        "max_length_k": longest or max(lengths),
    }


def deal(lengths: Sequence[int], hands: int) -> list[list[int]]:
    """Deals numbers of examples out so that every hand has about as many tokens: longest first, to the shortest hand."""
    dealt: list[list[int]] = [[] for _ in range(hands)]
    tokens = [0] * hands
    for number in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        shortest = tokens.index(min(tokens))
        dealt[shortest].append(number)
        tokens[shortest] += lengths[number]
    return dealt


class StepPlan:
    """Which examples make up each optimizer step of a run. It depends on lengths, seed and step size alone.

    Args:
        lengths: of all examples, in tokens.
        batch_size: examples of a step; the last one of an epoch may have fewer.
        tokens_per_step: or tokens of a step at most, no fewer than the longest example. Steps go on from one epoch into
            the next, and an example may move forward by some steps to fill one. A step consists of equal bins, filled
            one by one, so that it can be halved, and halved again, into micro-batches that are as full.
        epochs, max_steps: the length of the run; max_steps decides where it is given.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        seed: int,
        *,
        batch_size: int,
        tokens_per_step: int | None = None,
        epochs: int,
        max_steps: int | None = None,
    ) -> None:
        self._lengths, self._seed, self._batch_size = lengths, seed, batch_size
        self.longest = max(lengths)
        self._order: tuple[int, list[int]] | None = None
        self._filled: list[list[list[int]]] | None = None
        if tokens_per_step is None:
            self.steps_per_epoch: float = -(-len(lengths) // batch_size)
            self.total_steps = max_steps or int(epochs * self.steps_per_epoch)
            self.examples_per_step: float = batch_size
        else:
            count = _bins_of_a_step(tokens_per_step, self.longest)
            bins = _fill(self._stream(None if max_steps else epochs), lengths, tokens_per_step // count)
            steps = iter(lambda: list(islice(bins, count)), [])
            self._filled = list(islice(steps, max_steps))
            self.total_steps = len(self._filled)
            self.examples_per_step = (
                sum(len(self.step(number)) for number in range(self.total_steps)) / self.total_steps
            )
            self.steps_per_epoch = len(lengths) / self.examples_per_step

    def step(self, number: int) -> list[int]:
        """The examples of the step `number`, from 0."""
        if self._filled is not None:
            return [example for one in self._filled[number] for example in one]
        epoch, place = divmod(number, int(self.steps_per_epoch))
        return self._shuffled(epoch)[place * self._batch_size : (place + 1) * self._batch_size]

    def hands(self, number: int, count: int) -> list[list[int]]:
        """The examples of a step, dealt out into `count` micro-batches, of which some may be empty."""
        if self._filled is not None:
            bins = self._filled[number]
            if len(bins) == len(self._filled[0]) and len(bins) % count == 0:
                share = len(bins) // count
                return [[i for one in bins[k * share : (k + 1) * share] for i in one] for k in range(count)]
        chosen = self.step(number)
        return [[chosen[i] for i in hand] for hand in deal([self._lengths[i] for i in chosen], count)]

    def tokens(self, examples: Sequence[int]) -> int:
        return sum(self._lengths[i] for i in examples)

    def micro_batches(self, capacity: int, processes: int) -> int:
        """How many micro-batches a step needs so that none has more than `capacity` tokens; a multiple of `processes`.

        `capacity` is at least the tokens of the longest example.
        """
        totals = [self.tokens(self.step(number)) for number in range(self.total_steps)]
        count = processes * -(-max(totals) // (capacity * processes))
        while True:
            tight = (number for number, total in enumerate(totals) if total > 0.5 * count * capacity)
            if all(self.tokens(hand) <= capacity for number in tight for hand in self.hands(number, count)):
                return count
            count += processes

    def _shuffled(self, epoch: int) -> list[int]:
        if self._order is None or self._order[0] != epoch:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
            self._order = epoch, torch.randperm(len(self._lengths), generator=generator).tolist()
        return self._order[1]

    def _stream(self, epochs: int | None) -> Iterator[int]:
        epoch = 0
        while epochs is None or epoch < epochs:
            yield from self._shuffled(epoch)
            epoch += 1


def _bins_of_a_step(tokens_per_step: int, longest: int) -> int:
    """A power of two, so that the bins are equal and large enough to be filled whatever the lengths are."""
    count = 1
    while (
        count < _MOST_BINS and tokens_per_step % (2 * count) == 0 and tokens_per_step // (2 * count) >= _LEAST * longest
    ):
        count *= 2
    return count


def _fill(stream: Iterator[int], lengths: Sequence[int], capacity: int) -> Iterator[list[int]]:
    """Bins of the examples in `stream`: the next ones in order while there is plenty of room; the rest is filled by the one
    or two of those that follow which fit best."""
    waiting = list(islice(stream, _LOOK_AHEAD))
    while waiting:
        chosen: list[int] = []
        room = capacity
        while waiting and (not chosen or room > 2 * max(lengths[number] for number in waiting)):
            number = waiting.pop(0)
            chosen.append(number)
            room -= lengths[number]
            waiting.extend(islice(stream, 1))
        best = _best_fit([lengths[number] for number in waiting], room)
        for place in reversed(best):
            chosen.append(waiting.pop(place))
        waiting.extend(islice(stream, len(best)))
        yield chosen


def _best_fit(lengths: Sequence[int], room: int) -> list[int]:
    """Places, in order, of the one or two lengths whose sum comes closest to `room` from below; none where none fits."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    single = [i for i in order if lengths[i] <= room][-1:]
    best, best_sum = single, sum(lengths[i] for i in single)
    low, high = 0, len(order) - 1
    while low < high:
        total = lengths[order[low]] + lengths[order[high]]
        if total > room:
            high -= 1
        else:
            if total > best_sum:
                best, best_sum = [order[low], order[high]], total
            low += 1
    return sorted(best)


class StepDataset(Dataset[dict[str, Any]]):
    """Every item is one packed micro-batch; `micro_batches` items in a row make an optimizer step of the whole run."""

    def __init__(
        self, examples: Sequence[Example], plan: StepPlan, micro_batches: int, longest: int | None = None
    ) -> None:
        self.examples, self.plan, self.micro_batches, self.longest = examples, plan, micro_batches, longest
        self._dealt: tuple[int, list[list[Example]]] | None = None

    def __len__(self) -> int:
        return self.plan.total_steps * self.micro_batches

    def __getitem__(self, index: int) -> dict[str, Any]:
        step, micro_batch = divmod(index, self.micro_batches)
        if self._dealt is None or self._dealt[0] != step:
            hands = self.plan.hands(step, self.micro_batches)
            self._dealt = step, [[self.examples[i] for i in hand] for hand in hands]
        # A step may have fewer examples than micro-batches. All processes must run the model all the same.
        spare = min((hand for hand in self._dealt[1] if hand), key=len)
        return pack(self._dealt[1][micro_batch] or [spare[0].without_labels()], self.longest)


def live_positions(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Where the model predicts a response token, and which: (positions [N], tokens [N]) from labels [1, T].

    The first token of a sequence never carries a label, so that no sequence predicts into the next.
    """
    positions = (labels[0, 1:] >= 0).nonzero()[:, 0]
    return positions, labels[0, positions + 1]
