"""Numbers at the edge of what float formats hold, for the Triton kernels: gradients that are exactly zero, rows of few
keys, large scores, outputs that overflow. Run by the tests in the interpreter and on a GPU, like `triton_checks`."""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from llama_adapter_kernels.testing import Case, Problem, deviations, make_problem, truth_of
from tests.support.triton_checks import decode_problem, poisoned_memory

ONE_HEAD_PAIR = {"batch": 1, "heads_q": 2, "heads_kv": 1}

# Problems in which some rows see one key, and those rows: a softmax over one key is 1, and 1 has no gradient.
ONE_KEY: list[tuple[Case, dict[str, Any], slice]] = [
    (Case(**ONE_HEAD_PAIR, seq_q=33, seq_k=1, is_causal=False), {}, slice(0, 33)),
    (Case(**ONE_HEAD_PAIR, seq_q=33, seq_k=33), {}, slice(0, 1)),
    (Case(**ONE_HEAD_PAIR, seq_q=20, seq_k=40, is_causal=False), {"key_start": [37], "key_end": [38]}, slice(0, 20)),
    (Case(**ONE_HEAD_PAIR, seq_q=20, seq_k=40, is_causal=False), {"attn_mask": 35}, slice(0, 20)),
    (Case(heads_q=2, heads_kv=1, lengths=((1, 1), (1, 1), (9, 1), (1, 1)), is_causal=False), {}, slice(0, 12)),
]


def _with(case: Case, extra: dict[str, Any], dtype: torch.dtype, device: str) -> Problem:
    """The problem of a case with windows, or with a mask that leaves one key, added."""
    problem = make_problem(case, dtype, device)
    for name, value in extra.items():
        if name == "attn_mask":
            problem.arguments[name] = torch.zeros(1, 1, case.seq_q, case.seq_k, dtype=torch.bool, device=device)
            problem.arguments[name][..., value] = True
        else:
            problem.arguments[name] = torch.tensor(value, dtype=torch.int32, device=device)
    return problem


def _run(problem: Problem, device: str) -> dict[str, Tensor]:
    with poisoned_memory(device):
        output = problem.forward("triton")
        return {"output": output} | {f"d{name}": gradient for name, gradient in problem.backward(output).items()}


def one_key_has_no_score_gradient(dtype: torch.dtype, device: str = "cpu") -> None:
    """Not rounding noise, zero: as eager PyTorch gives. With one prefix slot nothing is left of dq either."""
    for case, extra, rows in ONE_KEY:
        for prefix in ({"prefix": "none"}, {"prefix_length": 1}):
            problem = _with(replace(case, **prefix), extra, dtype, device)  # type: ignore[arg-type]
            results = _run(problem, device)
            dquery = results["dquery"] if case.lengths else results["dquery"].movedim(2, 0)
            assert (dquery[rows] == 0).all(), case.name
            assert (dquery[rows.stop :] != 0).any(1).all(), case.name
            if rows.stop == dquery.shape[0]:
                assert (results["dkey"] == 0).all(), case.name
            if "dprefix_key" in results:
                assert (results["dprefix_key"] == 0).all(), case.name
            bad = [str(deviation) for deviation in deviations(problem, results) if not deviation.ok]
            assert not bad, (case.name, bad)


def one_key_without_numbers_shows(device: str = "cpu") -> None:
    """The zero of a single key hides no NaN or infinity of the gradient that arrives."""
    for bad in (torch.nan, torch.inf):
        problem = make_problem(Case(**ONE_HEAD_PAIR, seq_q=3, seq_k=1, is_causal=False), torch.float32, device)
        assert problem.doutput is not None
        problem.doutput[0, 0, 1, 5] = bad
        results = _run(problem, device)
        assert results["dquery"][0, 0, 1].isnan().all()
        assert results["dquery"][0, 0, 0].isfinite().all()
        assert results["dquery"][0, 1].isfinite().all()


def few_keys_keep_their_digits(dtype: torch.dtype, device: str = "cpu") -> None:
    """Values far from zero that differ little: from an output rounded to 8 bits dP - D_w would have no right digit."""
    cases = [
        (Case(**ONE_HEAD_PAIR, seq_q=12, seq_k=12, prefix="none"), {}),  # rows of 1 to 12 keys
        (Case(**ONE_HEAD_PAIR, seq_q=20, seq_k=15, prefix="none", is_causal=False), {}),
        (Case(**ONE_HEAD_PAIR, seq_q=20, seq_k=64, is_causal=False), {"key_start": [30], "key_end": [39]}),
        (Case(**ONE_HEAD_PAIR, seq_q=20, seq_k=64, is_causal=False), {"attn_mask": slice(31, 64, 8)}),
        (Case(heads_q=2, heads_kv=1, lengths=((11, 3), (7, 15)), is_causal=False), {}),
    ]
    for case, extra in cases:
        problem = _with(case, extra, dtype, device)
        value = problem.tensors["value"]
        assert value is not None
        value.data.mul_(0.5).add_(64)  # a step of bfloat16 at 64
        results = _run(problem, device)
        exact = truth_of(problem).exact
        for name in ("dquery", "dkey"):
            error = (results[name].double().cpu() - exact[name]).abs().max() / exact[name].abs().max()
            assert error < 8 * torch.finfo(dtype).eps, (case.name, name, error)


def _fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return (a.double() * b.double() + c.double()).float()


def flash_formula(problem: Problem) -> dict[str, Tensor]:
    """The words' gradients by FlashAttention-2's formula: P from a float32 log-sum-exp, D from the rounded output, P
    and dS rounded to the inputs' dtype before each product, sums in float32. As there, the backward pass computes the
    scores again, in other tiles: it adds the products up in another order."""
    query, key, value = (
        tensor.detach() for n in ("query", "key", "value") if (tensor := problem.tensors[n]) is not None
    )
    group, scale = query.shape[1] // key.shape[1], query.shape[-1] ** -0.5
    dtype, doutput = query.dtype, problem.doutput
    assert doutput is not None
    q, k, v, do = (
        t.float() for t in (query, key.repeat_interleave(group, 1), value.repeat_interleave(group, 1), doutput)
    )
    hidden = torch.zeros(q.shape[-2], k.shape[-2], dtype=torch.bool)
    if problem.arguments["is_causal"]:
        hidden = torch.ones_like(hidden).triu(1)
    scores = (q @ k.mT).masked_fill(hidden.to(q.device), -torch.inf)
    again = (q.flip(-1) @ k.flip(-1).mT).masked_fill(hidden.to(q.device), -torch.inf)
    scale_log2 = torch.tensor(scale * math.log2(math.e))
    largest = scores.amax(-1, keepdim=True)
    unnormalised = _fma(scores, scale_log2, -largest * scale_log2).exp2()
    total = unnormalised.sum(-1, keepdim=True)
    logsumexp = largest * scale + total.log()
    output = ((unnormalised.to(dtype).float() @ v) / total).to(dtype)
    probabilities = _fma(again, scale_log2, -logsumexp * math.log2(math.e)).exp2()
    delta = (do * output.float()).sum(-1, keepdim=True)
    dscores = (probabilities * (do @ v.mT - delta)).to(dtype).float()

    def of_group(gradient: Tensor) -> Tensor:
        return gradient.unflatten(1, (-1, group)).sum(2).to(dtype)

    return {
        "output": output,
        "dquery": (scale * (dscores @ k)).to(dtype),
        "dkey": of_group(scale * (dscores.mT @ q)),
        "dvalue": of_group(probabilities.to(dtype).float().mT @ do),
    }


def large_scores(dtype: torch.dtype, size: float, seed: int, device: str = "cpu") -> None:
    """Inputs `size` times larger than usual: no worse than FlashAttention's formula, result by result.

    The largest error is that of one row in which two scores are nearly the same, so it is taken over two problems.

    float32: in the interpreter numpy sums the scores of other tile shapes in another order, and the error of a large score
    is the error of its probability.
    """
    errors: dict[str, list[tuple[float, float, float]]] = {}
    for number in (seed, seed + 2):
        case = Case(**ONE_HEAD_PAIR, seq_q=40, seq_k=40, prefix="none", is_causal=seed % 2 == 0, seed=number)
        problem = make_problem(case, dtype, device)
        for name in ("query", "key", "value"):
            tensor = problem.tensors[name]
            assert tensor is not None
            tensor.data.mul_(size)
        results, flash, exact = _run(problem, device), flash_formula(problem), truth_of(problem).exact
        for name, truth in exact.items():
            error, of_flash = ((r[name].double().cpu() - truth).abs().max().item() for r in (results, flash))
            errors.setdefault(name, []).append((error, of_flash, truth.abs().max().item()))
    for name, found in errors.items():
        error, of_flash, largest = (max(numbers) for numbers in zip(*found, strict=True))
        floor = torch.finfo(dtype).eps * largest
        allowed = (4 if dtype == torch.float32 else 2) * of_flash + 2 * floor
        assert error <= allowed, f"{name}: error {error:.3e}, FlashAttention's {of_flash:.3e}, {floor=:.3e}"


def one_dominant_score(which: str, where: int, device: str = "cpu") -> None:
    """A score of 140 and more in an early or a late tile: exponentials relative to another tile's maximum overflow."""
    case = Case(**ONE_HEAD_PAIR, seq_q=2, seq_k=300, prefix_length=100)
    problem = make_problem(case, torch.float16, device)
    query, key = problem.tensors["query"], problem.tensors[which]
    assert query is not None
    assert key is not None
    query.data[..., :8] = query.data[..., :8].abs() + 1
    key.data[:, :, where] = 0
    key.data[:, :, where, :8] = 100
    results = _run(problem, device)
    bad = [str(deviation) for deviation in deviations(problem, results) if not deviation.ok]
    assert not bad, bad
    decode_problem(problem, device)


def overflowing_output_keeps_gradients(device: str = "cpu") -> None:
    """float16: the output overflows (to infinity, as eager's), the gradients do not need it and stay finite."""
    problem = make_problem(Case(**ONE_HEAD_PAIR, seq_q=33, seq_k=33), torch.float16, device)
    for name, factor in (("value", 3e4), ("prefix_value", 3e4)):
        tensor = problem.tensors[name]
        assert tensor is not None
        tensor.data.clamp_(-2, 2).mul_(factor)
    results = _overflowing(problem, device)
    assert results["output"].isinf().any()


def one_key_of_many_overflows(device: str = "cpu") -> None:
    """As above, in rows that see many keys of which one has all of the probability: such a row is not marked, because
    blocks of keys that are seen whole look for no mark (see FEW_KEYS). What the output says of D_w is +inf or -inf here,
    not NaN."""
    problem = make_problem(Case(**ONE_HEAD_PAIR, seq_q=4, seq_k=80, is_causal=False), torch.float16, device)
    query, key = problem.tensors["query"], problem.tensors["key"]
    assert query is not None
    assert key is not None
    query.data[..., :8] = query.data[..., :8].abs() + 1
    query.data[:, :, 2:, :8] *= -1  # these rows keep away from the key that has all of the others
    key.data[:, :, 5] = 0
    key.data[:, :, 5, :8] = 100
    for name in ("value", "prefix_value"):
        tensor = problem.tensors[name]
        assert tensor is not None
        tensor.data.mul_(100).add_(4e4)
    gate = problem.tensors["gate"]
    assert gate is not None
    gate.data.fill_(1.0)
    assert problem.doutput is not None
    problem.doutput.abs_()[:, 1].neg_()
    results = _overflowing(problem, device)
    assert results["output"].isinf().all()


def _overflowing(problem: Problem, device: str) -> dict[str, Tensor]:
    """The results, whose gradients are no worse than eager's."""
    assert problem.doutput is not None
    problem.doutput.mul_(1e-3)
    results = _run(problem, device)
    assert not results["output"].isnan().any()
    truth = truth_of(problem)
    for name in ("dquery", "dkey", "dvalue", "dprefix_key", "dprefix_value"):
        assert truth.base[name] < torch.inf, f"eager's {name} is finite here"
        error = (results[name].double().cpu() - truth.exact[name]).abs().max().item()
        floor = torch.finfo(torch.float16).eps * truth.exact[name].abs().max().item()
        assert error <= 2 * truth.base[name] + 2 * floor, (name, error, truth.base[name])
    return results
