"""Counts of operations and bytes, against enumeration."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from llama_adapter_kernels import testing
from llama_adapter_kernels.bench.cases import ModelShape
from llama_adapter_kernels.bench.model_problem import empty_model
from llama_adapter_kernels.bench.work import attention_work, model_work, score_pairs
from llama_adapter_kernels.ops import reference


def pairs_by_mask(problem: testing.Problem) -> int:
    query, key = problem.tensors["query"], problem.tensors["key"]
    allowed = reference.allowed_keys(query, key, problem.case.is_causal, None, None, problem.arguments.get("key_end"))
    return int(allowed.expand(query.shape[0], 1, query.shape[2], key.shape[2]).sum())


def test_pairs_are_those_of_the_mask() -> None:
    for is_causal in (False, True):
        for window in ("none", "end"):
            case = testing.Case(batch=3, seq_q=7, seq_k=11, is_causal=is_causal, window=window)
            problem = testing.make_problem(case)
            assert score_pairs(problem) == pairs_by_mask(problem)


def test_packed_pairs() -> None:
    problem = testing.make_problem(testing.Case(lengths=((3, 3), (5, 5)), is_causal=True))
    assert score_pairs(problem) == 6 + 15


def test_model_flop_are_those_that_torch_counts() -> None:
    """Without a prefix: linear layers and the scores of a full (not causal) pass are all that either counts."""
    shape = ModelShape(hidden=32, heads_q=4, heads_kv=2, head_dim=16, layers=2, batch=2, sequence=8, vocabulary=64)
    model = empty_model(shape, "step", "eager", None).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(2, 8, dtype=torch.long))
    forward = model_work(shape, "forward", 4, 0)
    module = 2 * 2 * 8 * 32 * (2 * 4 * 16 + 2 * 2 * 16)  # tokens x projections of one layer
    scores = 4 * 16 * 4 * 2 * (8 * 9 // 2)
    assert forward.flop == 2 * (module + scores)
    step = model_work(shape, "step", 4, 0)
    whole_scores = 4 * 16 * 4 * 2 * 8 * 8  # eager attention computes the masked half too
    products = counter.get_total_flops() - 2 * whole_scores
    assert step.flop == 2 * products + 2 * 3.5 * scores


def test_flop_and_bytes() -> None:
    case = testing.Case(batch=2, heads_q=4, heads_kv=2, seq_q=8, seq_k=8, head_dim=16, is_causal=False)
    problem = testing.make_problem(case, torch.bfloat16)
    work = attention_work(problem, "forward")
    assert work.flop == 4 * 16 * 4 * (2 * 8 * 8 + 2 * 8 * 10)
    queries, keys, prefix = 2 * 4 * 8 * 16, 2 * 2 * 8 * 16, 2 * 10 * 16
    assert work.bytes == 2 * (2 * queries + 2 * keys + 2 * prefix)
    both = attention_work(problem, "forward+backward")
    assert both.flop == 3.5 * work.flop
    assert both.bytes > 2 * work.bytes
