"""The CPU kernels far from unit scale: as exact as FlashAttention's formula, and finite where eager PyTorch is."""

from functools import cache

import pytest
import torch

from llama_adapter_kernels.testing import Case, Problem, Truth, truth_of
from tests.support.scales import SCALES, Scales, faults_at_scale, scaled_problem

CASES = [
    Case(seq_q=130, seq_k=200),  # causal, several blocks of keys
    Case(batch=3, seq_q=33, seq_k=150, mask="bool", prefix="table", gate="prefix"),
    Case(prefix="none", head_dim=64),
]


@cache
def problem_and_truth(case: Case, dtype: torch.dtype, scales: Scales) -> tuple[Problem, Truth]:
    problem = scaled_problem(case, dtype, scales)
    return problem, truth_of(problem)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_as_exact_as_the_formula(case: Case, dtype: torch.dtype, isa: str) -> None:
    faults = []
    for scales in SCALES:
        problem, truth = problem_and_truth(case, dtype, scales)
        output = problem.forward("cpu")
        results = {"output": output} | {f"d{name}": g for name, g in problem.backward(output).items()}
        faults += [f"{scales} {fault}" for fault in faults_at_scale(problem, results, truth)]
    assert not faults, "\n".join(faults)


def test_the_log_sum_exp_of_many_keys_of_like_weight(isa: str) -> None:
    """One chain of 2000 additions of numbers near 1 would err by four units in the last place; float64 is the truth."""
    torch.manual_seed(0)
    q, k = 1e-3 * torch.randn(1, 2, 64, 16), torch.randn(1, 2, 2000, 16)
    _, logsumexp = torch.ops.llama_adapter_kernels.forward(q, k, k, *[None] * 9, 0, 0, 0.25, False)
    exact = (0.25 * q.double() @ k.double().mT).logsumexp(dim=-1)
    assert (logsumexp - exact).abs().max() <= torch.finfo(torch.float32).eps * 8  # two units of the last place of 7.6
