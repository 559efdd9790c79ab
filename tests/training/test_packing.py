"""Packed steps: nothing lost, nothing twice, the same step for any number of micro-batches and after a resume."""

import pytest
import torch

from llama_adapter_kernels.training.data import IGNORED_LABEL, Example
from llama_adapter_kernels.training.packing import StepDataset, deal, live_positions, pack


def example(number: int, length: int = 5, prompt: int = 2) -> Example:
    return Example(tuple(100 * number + i for i in range(length)), prompt)


def test_pack() -> None:
    batch = pack([example(1, 3), example(2, 4)])
    assert batch["input_ids"].tolist() == [[100, 101, 102, 200, 201, 202, 203]]
    assert batch["labels"].tolist() == [[-100, -100, 102, -100, -100, 202, 203]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3]]
    assert batch["cu_seq_lens_q"].tolist() == batch["cu_seq_lens_k"].tolist() == [0, 3, 7]
    assert batch["cu_seq_lens_q"].dtype == torch.int32
    assert batch["max_length_q"] == batch["max_length_k"] == 4


def test_live_positions_predict_the_response_and_nothing_across_sequences() -> None:
    positions, tokens = live_positions(pack([example(1, 3), example(2, 4)])["labels"])
    assert positions.tolist() == [1, 4, 5]
    assert tokens.tolist() == [102, 202, 203]


def test_deal_balances_tokens() -> None:
    examples = [example(i, length) for i, length in enumerate([9, 1, 5, 5, 8, 2, 3, 7])]
    hands = deal(examples, 3)
    assert sorted(e.tokens for hand in hands for e in hand) == sorted(e.tokens for e in examples)
    tokens = [sum(map(len, hand)) for hand in hands]
    assert max(tokens) - min(tokens) <= 3


def tokens_of_step(dataset: StepDataset, step: int) -> set[int]:
    batches = [dataset[step * dataset.micro_batches + i] for i in range(dataset.micro_batches)]
    live = [batch["labels"][batch["labels"] != IGNORED_LABEL] for batch in batches]
    tokens = torch.cat(live).tolist()
    assert len(set(tokens)) == len(tokens)
    return set(tokens)


@pytest.mark.parametrize("micro_batches", [1, 2, 5])
def test_a_step_is_the_same_however_it_is_dealt_out(micro_batches: int) -> None:
    examples = [example(i, 4 + i % 7) for i in range(23)]
    whole = StepDataset(examples, 5, 1, seed=3)
    parts = StepDataset(examples, 5, micro_batches, seed=3)
    assert parts.steps == 5
    assert len(parts) == 5 * micro_batches
    for epoch in (0, 1):
        whole.epoch = parts.epoch = epoch
        steps = [tokens_of_step(parts, step) for step in range(5)]
        assert steps == [tokens_of_step(whole, step) for step in range(5)]
        assert set.union(*steps) == {t for e in examples for t in e.labels if t != IGNORED_LABEL}


def test_the_order_depends_on_epoch_and_seed_alone() -> None:
    examples = [example(i) for i in range(20)]
    dataset = StepDataset(examples, 4, 2, seed=0)
    first = dataset[0]["input_ids"]
    dataset.epoch = 1
    second = dataset[0]["input_ids"]
    assert not torch.equal(first, second)
    again = StepDataset(examples, 4, 2, seed=0)
    again.epoch = 1
    assert torch.equal(again[0]["input_ids"], second)
    assert not torch.equal(StepDataset(examples, 4, 2, seed=1)[0]["input_ids"], first)


def test_a_last_step_with_fewer_examples_than_micro_batches_teaches_each_once() -> None:
    dataset = StepDataset([example(i) for i in range(5)], 4, 4, seed=0)
    batches = [dataset[4 + i] for i in range(4)]
    live = [int((batch["labels"] != IGNORED_LABEL).sum()) for batch in batches]
    assert live == [3, 0, 0, 0]
    assert all(batch["input_ids"].shape[1] > 0 for batch in batches)
