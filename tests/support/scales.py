"""Problems whose inputs are far from unit scale, and how exact a backend has to be on them.

There the tolerance rule of `llama_adapter_kernels.testing` asks for too much: float32 scores of 1e5 have lost what stands
behind their hundredths, whoever multiplies them, and eager PyTorch is exact by luck where a softmax has one key left. The
yardstick here is FlashAttention's formula, in float32, with a float32 log-sum-exp and operands rounded to the storage type
before each product: a backend may be twice as wrong as that or as the rule allows, whichever is more. And where the formula
or eager PyTorch is finite, every result that its dtype can hold is finite.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llama_adapter_kernels.ops import reference
from llama_adapter_kernels.testing import Case, Problem, Truth, deviation, make_problem, truth_of


@dataclass(frozen=True)
class Scales:
    """What standard normal inputs are multiplied by; the prefix's keys and values as the words'."""

    query: float = 1.0
    key: float = 1.0
    value: float = 1.0
    doutput: float = 1.0
    gate: float = 1.0

    def __str__(self) -> str:
        return "_".join(f"{name}{factor:g}" for name, factor in vars(self).items() if factor != 1.0) or "unit"


# Scores from nothing to 1e6, values and gradients that are tiny or near the end of float16, gates that drown either branch.
SCALES = (
    Scales(),
    Scales(query=1e-3, key=1e-3),
    Scales(query=10.0, key=10.0),
    Scales(query=30.0, key=30.0),
    Scales(query=1e3, key=1e-3),
    Scales(query=1e3, key=1e3),
    Scales(query=1e3, key=1e3, value=1e3, doutput=1e-3),
    Scales(value=1e3, doutput=1e3),
    Scales(value=1e-3, doutput=1e-3),
    Scales(value=6e3, doutput=1e-3, gate=16.0),
    Scales(gate=100.0),
    Scales(query=30.0, key=30.0, gate=1e-2),
)


def scaled_problem(case: Case, dtype: torch.dtype, scales: Scales) -> Problem:
    """`make_problem`'s random inputs times the scales, rounded to `dtype`."""
    problem = make_problem(case, torch.float64)
    factors = vars(scales) | {"prefix_key": scales.key, "prefix_value": scales.value}
    tensors = {
        name: None if tensor is None else (tensor.detach() * factors[name]).requires_grad_()
        for name, tensor in problem.tensors.items()
    }
    assert problem.doutput is not None
    doutput = problem.doutput * scales.doutput
    rounded = replace(problem, tensors=tensors, doutput=doutput).to(dtype)
    assert rounded.doutput is not None
    return rounded


def flash_results(problem: Problem) -> dict[str, Tensor]:
    """Output and gradients of a padded problem by FlashAttention's formula, as one would write it with two softmaxes."""
    case, tensors, arguments = problem.case, problem.tensors, problem.arguments
    query, key, value = (tensors[name] for name in ("query", "key", "value"))
    assert query is not None and key is not None and value is not None and problem.doutput is not None
    dtype, group = query.dtype, case.heads_q // case.heads_kv
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    scale = case.scale if case.scale is not None else case.head_dim**-0.5

    def wide(tensor: Tensor, repeats: int = 1) -> Tensor:
        return tensor.detach().to(compute).repeat_interleave(repeats, dim=1)

    def rounded(tensor: Tensor) -> Tensor:
        return tensor.to(dtype).to(compute)

    def group_sum(tensor: Tensor) -> Tensor:
        return tensor.unflatten(1, (case.heads_kv, group)).sum(dim=2)

    q, k, v, doutput = wide(query), wide(key, group), wide(value, group), problem.doutput.to(compute)
    scores = scale * (q @ k.mT)
    mask = arguments.get("attn_mask")
    if mask is not None and mask.dtype != torch.bool:
        scores, mask = scores + mask.to(compute), mask != -torch.inf
    allowed = reference.allowed_keys(q, k, case.is_causal, mask, arguments.get("key_start"), arguments.get("key_end"))
    scores = scores.masked_fill(~allowed, -torch.inf)
    highest = scores.amax(dim=-1, keepdim=True).nan_to_num(neginf=0.0)
    weights = torch.exp(scores - highest)
    total = weights.sum(dim=-1, keepdim=True)
    output = (rounded(weights) @ v) / torch.where(total == 0, 1.0, total)
    logsumexp = torch.where(total == 0, torch.inf, highest + total.log())

    results: dict[str, Tensor] = {}
    dquery, of_prefix = torch.zeros_like(q), 0.0
    if tensors["prefix_key"] is not None:
        prefix_key, prefix_value, gate = (tensors[name] for name in ("prefix_key", "prefix_value", "gate"))
        assert prefix_key is not None and prefix_value is not None and gate is not None
        count, index = prefix_key.shape[0], arguments.get("prefix_index")
        gates = gate.detach().to(compute).expand(count, case.heads_q)
        pk, pv, gates = reference.select_prefix(wide(prefix_key, group), wide(prefix_value, group), gates, index)
        gates = gates[:, :, None, None]
        p = torch.softmax(scale * (q @ pk.mT), dim=-1)
        output = output + gates * (rounded(p) @ pv)
        dp = doutput @ pv.mT
        d_prefix = (p * dp).sum(dim=-1, keepdim=True)
        dscores = gates * p * (dp - d_prefix)
        dquery, of_prefix = rounded(dscores) @ pk, gates * d_prefix

        def entry_sum(tensor: Tensor) -> Tensor:  # over the sequences that use each entry of the prefix table
            if index is not None:
                used = index >= 0
                zeros = tensor.new_zeros(count, *tensor.shape[1:])
                return zeros.index_add(0, index[used].long(), tensor[used])
            return tensor if count == case.batch else tensor.sum(dim=0, keepdim=True)

        results["dprefix_key"] = entry_sum(group_sum(scale * (rounded(dscores).mT @ q)))
        results["dprefix_value"] = entry_sum(group_sum(rounded(gates * p).mT @ doutput))
        results["dgate"] = entry_sum(d_prefix.sum(dim=(2, 3))).sum_to_size(gate.shape)
    output = output.to(dtype)
    delta = (doutput * output.to(compute)).sum(dim=-1, keepdim=True) - of_prefix
    p = torch.exp(scores - logsumexp)
    dscores = p * (doutput @ v.mT - delta)
    results |= {
        "output": output,
        "dquery": scale * (dquery + rounded(dscores) @ k),
        "dkey": group_sum(scale * (rounded(dscores).mT @ q)),
        "dvalue": group_sum(rounded(p).mT @ doutput),
    }
    return {name: r.to(torch.float32 if name == "dgate" else dtype) for name, r in results.items()}


def _orders(problem: Problem, count: int) -> Iterator[Callable[[Tensor], Tensor]]:
    """Orders of head_dim: one problem to mathematics, another draw of every rounding error."""
    query = problem.tensors["query"]
    assert query is not None
    generator = torch.Generator().manual_seed(0)
    for draw in range(count):
        order = torch.randperm(query.shape[-1], generator=generator) if draw else torch.arange(query.shape[-1])
        yield lambda tensor, order=order: tensor[..., order]


def flash_errors(problem: Problem, exact: dict[str, Tensor], orders: int = 4) -> dict[str, float]:
    """Largest errors of FlashAttention's formula over some orders of head_dim; infinite where it is NaN."""
    worst = dict.fromkeys(exact, 0.0)
    for order in _orders(problem, orders):

        def leaf(name: str, tensor: Tensor | None, order: Callable[[Tensor], Tensor] = order) -> Tensor | None:
            return tensor if tensor is None or name == "gate" else order(tensor.detach())

        tensors = {name: leaf(name, tensor) for name, tensor in problem.tensors.items()}
        for name, result in flash_results(
            replace(problem, tensors=tensors, doutput=leaf("doutput", problem.doutput))
        ).items():
            error = error_of(result, exact[name] if name == "dgate" else order(exact[name]))
            worst[name] = max(worst[name], torch.inf if error != error else error)
    return worst


def _limits(dtype: torch.dtype) -> tuple[float, float]:
    info = torch.finfo(dtype)
    return info.min, info.max


def error_of(result: Tensor, exact: Tensor) -> float:
    """Largest error, where what is beyond the dtype counts as its largest number; NaN where the result is."""
    limits = _limits(result.dtype)
    return (result.detach().to("cpu", torch.float64).clamp(*limits) - exact.clamp(*limits)).abs().max().item()


def faults_at_scale(problem: Problem, results: dict[str, Tensor], truth: Truth | None = None) -> list[str]:
    """Names each of the results {"output", "dquery", ...} that the rule of this module does not allow."""
    truth = truth_of(problem) if truth is None else truth
    of_formula, faults = flash_errors(problem, truth.exact), []
    for name, result in results.items():
        exact = truth.exact[name]
        if exact.numel() == 0:
            continue
        judged = deviation(name, result, truth)
        floor = torch.finfo(result.dtype).eps * exact.abs().max().item()
        limits = [limit for limit in (judged.limit, 2 * of_formula[name] + 2 * floor) if limit < torch.inf]
        error = error_of(result, exact)
        if limits and not error <= max(limits):
            faults.append(
                f"{name}: error {error:.3e}, allowed {max(limits):.3e}; FlashAttention's formula {of_formula[name]:.3e}, "
                f"eager in the same dtype {judged.base:.3e}, largest element {exact.abs().max().item():.3e}"
            )
    return faults
