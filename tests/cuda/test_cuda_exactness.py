"""The CUDA kernels in the emulator: gradients that are exactly zero, rows of few keys, scores and outputs that are large."""

from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from llama_adapter_kernels.testing import Case, Problem, deviations, make_problem, truth_of
from tests.support.emulated import EmulatedProblem

WORDS = Case(batch=1, heads_q=2, heads_kv=1, head_dim=64, prefix="none")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def emulated(emulator: ModuleType, problem: Problem, deterministic: bool = False) -> dict[str, Tensor]:
    run = EmulatedProblem(emulator, problem, deterministic=deterministic)
    return {"output": run.forward()[0]} | run.backward()


def eager(problem: Problem) -> dict[str, Tensor]:
    output = problem.forward("reference")
    return {"output": output.detach()} | {f"d{name}": g for name, g in problem.backward(output).items()}


def with_arguments(problem: Problem, **arguments: Any) -> Problem:
    problem.arguments |= arguments
    return problem


def one_key_problems(dtype: torch.dtype) -> dict[str, Problem]:
    """Every way in which a row comes to see one key; in two of them only some rows do."""
    one = torch.zeros(1, 2, 33, 70, dtype=torch.bool)
    one[:, :, torch.arange(33), torch.arange(33) * 2] = True
    float_mask = torch.zeros(1, 2, 33, 70).masked_fill(~one, -torch.inf)
    wide = replace(WORDS, seq_q=33, seq_k=70, is_causal=False)
    start = torch.tensor([40], dtype=torch.int32)
    return {
        "one key": make_problem(replace(WORDS, seq_q=33, seq_k=1, is_causal=False), dtype),
        "causal": make_problem(replace(WORDS, seq_q=70, seq_k=70), dtype),
        "causal, more queries than keys": make_problem(replace(WORDS, seq_q=80, seq_k=10), dtype),
        "window": with_arguments(make_problem(wide, dtype), key_start=start, key_end=start + 1),
        "causal window": with_arguments(make_problem(replace(WORDS, seq_q=70, seq_k=70), dtype), key_start=start),
        "bool mask": with_arguments(make_problem(wide, dtype), attn_mask=one),
        "float mask": with_arguments(make_problem(wide, dtype), attn_mask=float_mask),
        "packed": make_problem(replace(WORDS, lengths=((1, 1), (63, 63), (2, 2), (1, 1), (5, 1))), dtype),
    }


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", list(one_key_problems(torch.float32)))
def test_zero_where_eager_is_zero(emulator: ModuleType, name: str, dtype: torch.dtype, deterministic: bool) -> None:
    """A row that sees one key: its probability is 1 whatever its score, so that nothing depends on query or key."""
    problem = one_key_problems(dtype)[name]
    expected, results = eager(problem), emulated(emulator, problem, deterministic)
    for gradient in ("dquery", "dkey"):
        zero = (expected[gradient] == 0).all(-1)
        assert zero.any() or gradient == "dkey"  # keys of rows that see more
        assert (results[gradient][zero] == 0).all(), gradient
    bad = [str(deviation) for deviation in deviations(problem, results) if not deviation.ok]
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_prefix_slot_has_no_score_gradient(emulator: ModuleType, dtype: torch.dtype) -> None:
    problem = make_problem(replace(WORDS, seq_q=33, seq_k=33, prefix="shared", prefix_length=1), dtype)
    assert (emulated(emulator, problem)["dprefix_key"] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seq_k", [2, 3, 8, 16])
def test_few_keys_without_allowance_for_the_saved_output(emulator: ModuleType, seq_k: int, dtype: torch.dtype) -> None:
    problem = make_problem(replace(WORDS, seq_q=40, seq_k=seq_k, is_causal=False), dtype)
    truth = replace(truth_of(problem), saved_output=0.0)
    bad = [str(d) for d in deviations(problem, emulated(emulator, problem), truth) if not d.ok]
    assert not bad, "\n".join(bad)


def flash_attention(problem: Problem) -> dict[str, Tensor]:
    """FlashAttention's formula: a float32 log-sum-exp, D = rowsum(dO * O) from the rounded O, P and dS rounded."""
    query, key, value = (problem.tensors[name].detach() for name in ("query", "key", "value"))  # type: ignore[union-attr]
    dtype, group = query.dtype, query.shape[1] // key.shape[1]
    doutput, scale = problem.doutput, query.shape[-1] ** -0.5
    assert doutput is not None
    wide_key, wide_value = (t.float().repeat_interleave(group, 1) for t in (key, value))
    rows, keys = query.shape[2], key.shape[2]
    hidden = torch.ones(rows, keys, dtype=torch.bool).triu(1 + keys - rows)

    def rounded(x: Tensor) -> Tensor:
        return x.to(dtype).float()

    scores = (scale * (query.float() @ wide_key.mT)).masked_fill(hidden, -torch.inf)
    logsumexp = scores.logsumexp(-1, keepdim=True)
    unnormalised = torch.exp(scores - scores.amax(-1, keepdim=True))
    output = rounded(rounded(unnormalised) @ wide_value / unnormalised.sum(-1, keepdim=True))
    p = torch.exp(scores - logsumexp)
    delta = (doutput.float() * output).sum(-1, keepdim=True)
    dscores = rounded(p * (doutput.float() @ wide_value.mT - delta))

    def of_kv_heads(x: Tensor) -> Tensor:
        return x.unflatten(1, (-1, group)).sum(2).to(dtype)

    return {
        "output": output, "dquery": (scale * dscores @ wide_key).to(dtype),
        "dkey": of_kv_heads(scale * dscores.mT @ query.float()), "dvalue": of_kv_heads(rounded(p).mT @ doutput.float()),
    }  # fmt: skip


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [0.01, 1.0, 10.0, 100.0, 1000.0])
def test_scores_of_every_size(emulator: ModuleType, size: float, dtype: torch.dtype, deterministic: bool) -> None:
    """Query, key and value times `size`, scores times its square: no worse than FlashAttention's formula, or than eager."""
    problem = make_problem(replace(WORDS, seq_q=70, seq_k=70, seed=int(size)), dtype)
    for name in ("query", "key", "value"):
        problem.tensors[name].data.mul_(size)  # type: ignore[union-attr]
    truth, results, flash = truth_of(problem), emulated(emulator, problem, deterministic), flash_attention(problem)
    eps = torch.finfo(dtype).eps
    for name, result in results.items():
        exact = truth.exact[name]
        error, flash_error = ((r.double() - exact).abs().max().item() for r in (result, flash[name]))
        limit = 2 * max(truth.base[name], flash_error) + 2 * eps * exact.abs().max().item()
        assert error <= limit, f"{name}: error {error:.3e}, eager {truth.base[name]:.3e}, flash {flash_error:.3e}"


@pytest.mark.parametrize("deterministic", [False, True])
def test_an_output_beyond_float16_leaves_the_gradients_alone(emulator: ModuleType, deterministic: bool) -> None:
    """Words and prefix of 4e4 each sum up to infinity; eager takes its gradients from the probabilities."""
    problem = make_problem(replace(WORDS, seq_q=70, seq_k=70, prefix="shared", is_causal=False), torch.float16)
    for name in ("value", "prefix_value"):
        problem.tensors[name].data.copy_(4e4 + 100 * torch.randn_like(problem.tensors[name]))  # type: ignore[union-attr]
    problem.tensors["gate"].data.fill_(1.0)  # type: ignore[union-attr]
    assert problem.doutput is not None
    problem.doutput.mul_(1e-3)
    expected, results = eager(problem), emulated(emulator, problem, deterministic)
    assert expected["output"].isinf().any()
    assert torch.equal(results["output"].isinf(), expected["output"].isinf())
    exact = eager(problem.to(torch.float64))
    for name in ("dquery", "dkey", "dvalue", "dprefix_key", "dprefix_value"):
        assert expected[name].isfinite().all(), name
        error, base = ((r[name].double() - exact[name]).abs().max() for r in (results, expected))
        assert error <= 2 * base + 2 * torch.finfo(torch.float16).eps * exact[name].abs().max(), name


def test_a_hidden_key_may_be_nan(emulator: ModuleType) -> None:
    """A mask of either kind selects: what it hides is not added to."""
    mask = torch.ones(1, 2, 33, 33, dtype=torch.bool)
    mask[..., 7] = False
    for attn_mask in (mask, torch.zeros(1, 2, 33, 33).masked_fill(~mask, -torch.inf)):
        problem = with_arguments(make_problem(replace(WORDS, is_causal=False), torch.bfloat16), attn_mask=attn_mask)
        clean, _ = EmulatedProblem(emulator, problem).forward()
        problem.tensors["key"].data[:, :, 7] = torch.nan  # type: ignore[union-attr]
        assert torch.equal(EmulatedProblem(emulator, problem).forward()[0], clean)
