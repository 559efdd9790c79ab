"""The named cases have the shapes of the models they are named after, on every kind of device."""

import pytest

from llama_adapter_kernels.bench import cases
from llama_adapter_kernels.bench.lengths import alpaca_lengths

# name -> (query heads, key/value heads, head_dim, causal)
SHAPES = {
    "llama-7b": (32, 32, 128, True),
    "llama-3-8b": (32, 8, 128, True),
    "llama-1b": (32, 8, 64, True),
    "vit-l-16": (16, 16, 64, False),
    "roberta-large": (16, 16, 64, False),
    "alpaca-7b": (32, 32, 128, True),
    "alpaca-1b": (32, 8, 64, True),
    "decode-7b": (32, 32, 128, True),
    "decode-8b": (32, 8, 128, True),
    "decode-8b-batch": (32, 8, 128, True),
}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_shapes(device: str) -> None:
    table = cases.cases(device)
    for name, expected in SHAPES.items():
        problem = table[name].problem
        assert (problem.heads_q, problem.heads_kv, problem.head_dim, problem.is_causal) == expected, name
        assert problem.prefix_length == 10, name
    assert table["vit-l-16"].sequence == 577
    roberta = table["roberta-large"]
    assert roberta.sequence == 512
    assert len(roberta.key_lengths) == roberta.problem.batch
    assert min(roberta.key_lengths) < 512 == max(roberta.key_lengths)
    for name in ("alpaca-7b", "alpaca-1b"):
        lengths = tuple(pair[0] for pair in table[name].problem.lengths)
        assert lengths == alpaca_lengths(len(lengths))
    assert {case.question for case in table.values()} == set(cases.MODES)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_quick_asks_every_question_and_lengths_make_a_plot(device: str) -> None:
    assert {case.question for case in cases.select(device, quick=True)} == set(cases.MODES)
    assert len({case.sequence for case in cases.cases(device).values() if case.sweep}) >= 4
