"""Packed steps: nothing lost, nothing twice, the same step for any number of micro-batches and after a resume."""

import pytest
import torch

from llama_adapter_kernels.training.packing import StepDataset, StepPlan, deal, live_positions, pack
from llama_adapter_kernels.training.tokens import IGNORED_LABEL, Example


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
    lengths = [9, 1, 5, 5, 8, 2, 3, 7]
    hands = deal(lengths, 3)
    assert sorted(i for hand in hands for i in hand) == list(range(8))
    tokens = [sum(lengths[i] for i in hand) for hand in hands]
    assert max(tokens) - min(tokens) <= 3


def dataset(examples: list[Example], batch_size: int, micro_batches: int, seed: int, epochs: int = 2) -> StepDataset:
    plan = StepPlan([len(e) for e in examples], seed, batch_size=batch_size, epochs=epochs)
    return StepDataset(examples, plan, micro_batches)


def tokens_of_step(dataset: StepDataset, step: int) -> set[int]:
    batches = [dataset[step * dataset.micro_batches + i] for i in range(dataset.micro_batches)]
    live = [batch["labels"][batch["labels"] != IGNORED_LABEL] for batch in batches]
    tokens = torch.cat(live).tolist()
    assert len(set(tokens)) == len(tokens)
    return set(tokens)


@pytest.mark.parametrize("micro_batches", [1, 2, 5])
def test_a_step_is_the_same_however_it_is_dealt_out(micro_batches: int) -> None:
    examples = [example(i, 4 + i % 7) for i in range(23)]
    whole, parts = dataset(examples, 5, 1, seed=3), dataset(examples, 5, micro_batches, seed=3)
    assert parts.plan.total_steps == 10
    assert parts.plan.steps_per_epoch == 5
    assert len(parts) == 10 * micro_batches
    steps = [tokens_of_step(parts, step) for step in range(10)]
    assert steps == [tokens_of_step(whole, step) for step in range(10)]
    for epoch in (steps[:5], steps[5:]):
        assert set.union(*epoch) == {t for e in examples for t in e.labels if t != IGNORED_LABEL}


def test_the_order_depends_on_epoch_and_seed_alone() -> None:
    examples = [example(i) for i in range(20)]
    first = dataset(examples, 4, 2, seed=0)
    assert not torch.equal(first[0]["input_ids"], first[10]["input_ids"])
    assert torch.equal(dataset(examples, 4, 2, seed=0)[10]["input_ids"], first[10]["input_ids"])
    assert not torch.equal(dataset(examples, 4, 2, seed=1)[0]["input_ids"], first[0]["input_ids"])


def test_a_last_step_with_fewer_examples_than_micro_batches_teaches_each_once() -> None:
    steps = dataset([example(i) for i in range(5)], 4, 4, seed=0)
    batches = [steps[4 + i] for i in range(4)]
    live = [int((batch["labels"] != IGNORED_LABEL).sum()) for batch in batches]
    assert live == [3, 0, 0, 0]
    assert all(batch["input_ids"].shape[1] > 0 for batch in batches)


LENGTHS = [20 + (7919 * i) % 237 + (300 if i % 41 == 0 else 0) for i in range(1500)]  # 20 to 556, about 145 on average


@pytest.mark.parametrize(
    ("step", "micro", "processes"),
    [(8192, 8192, 1), (8192, 4096, 2), (32768, 4096, 4), (16384, 2048, 2), (4096, 2048, 1)],
)
def test_steps_by_tokens_are_full_and_so_are_their_micro_batches(step: int, micro: int, processes: int) -> None:
    plan = StepPlan(LENGTHS, 0, batch_size=0, tokens_per_step=step, epochs=3)
    totals = [plan.tokens(plan.step(number)) for number in range(plan.total_steps)]
    assert max(totals) <= step
    assert sum(totals[:-1]) >= 0.98 * step * len(totals[:-1])
    count = plan.micro_batches(micro, processes)
    assert count == step // micro
    hands = [plan.tokens(hand) for number in range(plan.total_steps) for hand in plan.hands(number, count)]
    assert max(hands) <= micro
    assert sum(hands[:-count]) >= 0.98 * micro * len(hands[:-count])


def test_steps_by_tokens_use_every_example_once_an_epoch() -> None:
    plan = StepPlan(LENGTHS, 0, batch_size=0, tokens_per_step=8192, epochs=3)
    used = [i for number in range(plan.total_steps) for i in plan.step(number)]
    assert sorted(used) == sorted(3 * list(range(len(LENGTHS))))
    assert plan.examples_per_step == pytest.approx(len(used) / plan.total_steps)
    assert plan.steps_per_epoch == pytest.approx(plan.total_steps / 3)
    # An example moves forward by a few steps at most: an epoch is over before much of the one after the next begins.
    first = used[: len(LENGTHS)]
    assert len(set(first)) > 0.9 * len(first)
    other = StepPlan(LENGTHS, 1, batch_size=0, tokens_per_step=8192, epochs=3)
    assert other.step(0) != plan.step(0)


def test_steps_by_tokens_go_on_until_max_steps_and_do_not_depend_on_it() -> None:
    short = StepPlan(LENGTHS, 0, batch_size=0, tokens_per_step=8192, epochs=1, max_steps=100)
    long = StepPlan(LENGTHS, 0, batch_size=0, tokens_per_step=8192, epochs=1, max_steps=200)
    assert (short.total_steps, long.total_steps) == (100, 200)
    assert [short.step(number) for number in range(100)] == [long.step(number) for number in range(100)]


@pytest.mark.parametrize(
    ("tokens", "capacity", "processes"), [(None, 700, 1), (None, 700, 3), (5000, 1300, 3), (600, 600, 2)]
)
def test_no_micro_batch_is_over_its_budget(tokens: int | None, capacity: int, processes: int) -> None:
    plan = StepPlan(LENGTHS, 0, batch_size=16, tokens_per_step=tokens, epochs=1)
    count = plan.micro_batches(capacity, processes)
    assert count % processes == 0
    for number in range(plan.total_steps):
        hands = plan.hands(number, count)
        assert sorted(i for hand in hands for i in hand) == sorted(plan.step(number))
        assert all(plan.tokens(hand) <= capacity for hand in hands)
