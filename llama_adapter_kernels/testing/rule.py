"""The tolerance rule that every backend is held to.

It is FlashAttention's: compare with the reference in float64, and allow twice the error that eager PyTorch makes in the
dtype under test, plus twice the rounding of the result itself.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llama_adapter_kernels.testing.problems import Problem


@dataclass(frozen=True)
class Deviation:
    """How far one result is from float64, beside what the rule allows."""

    name: str
    error: float
    base: float
    limit: float
    relative: float

    @property
    def ok(self) -> bool:
        return self.error <= self.limit  # False for NaN

    def __str__(self) -> str:
        return (
            f"{self.name}: error {self.error:.3e}, allowed {self.limit:.3e}, "
            f"eager in the same dtype {self.base:.3e}, relative {self.relative:.1e}"
        )


def _truth(problem: Problem, backend: str) -> dict[str, Tensor]:
    output = problem.forward(backend)
    results = {"output": output.detach()}
    if problem.doutput is not None:
        results |= {f"d{name}": gradient for name, gradient in problem.backward(output).items()}
    return results


@dataclass(frozen=True)
class Truth:
    """What the results of one problem are compared with; computed once, good for any number of backends."""

    dtype: torch.dtype
    exact: dict[str, Tensor]  # float64
    base: dict[str, float]  # largest error of eager PyTorch in the dtype under test
    gate_summands: float = 0.0
    score_summands: float = 0.0  # what a score gradient is the difference of, where it cancels to nothing
    saved_output: float = 0.0  # what rounding the saved output to its dtype does to dquery and dkey, in units of eps


def truth_of(problem: Problem, device: str | torch.device = "cpu") -> Truth:
    """The reference's results {"output", "dquery", ...} for `problem`, in float64 and in its own dtype.

    Args:
        device: where the reference runs. Large problems take minutes in float64 on a CPU.
    """
    query = problem.tensors["query"]
    assert query is not None
    problem = problem.to(query.dtype, device)
    exact = {name: result.cpu() for name, result in _truth(problem.to(torch.float64, device), "reference").items()}
    base = _eager_errors(problem, query.dtype, exact)
    largest = {n: t.detach().abs().max().item() for n, t in problem.tensors.items() if t is not None and t.numel()}
    doutput = 0.0 if problem.doutput is None or not problem.doutput.numel() else problem.doutput.abs().max().item()
    values = max(largest.get("value", 0.0), largest.get("prefix_value", 0.0))
    # Gradients of keys add up over rows: their roundings walk randomly.
    summands = doutput * values * max(largest.get("query", 0.0), largest.get("key", 0.0))
    summands *= (query.numel() / query.shape[-1]) ** 0.5
    # D_w = rowsum(dO * O): each O is rounded, and the error of D_w reaches dquery and dkey times scale * K or Q.
    saved_output = 0.0
    if problem.doutput is not None and problem.doutput.numel():
        products = (problem.doutput.cpu().double() * exact["output"]).norm(dim=-1).max().item()
        scale = problem.arguments.get("scale") or query.shape[-1] ** -0.5
        saved_output = products * abs(scale) * max(largest.get("query", 0.0), largest.get("key", 0.0))
    gate_summands = _gate_summands(problem) if "dgate" in exact else 0.0
    return Truth(query.dtype, exact, base, gate_summands, summands, saved_output)


def _eager_errors(problem: Problem, dtype: torch.dtype, exact: dict[str, Tensor]) -> dict[str, float]:
    """Largest error of eager PyTorch per result, in float32 over several orders of head_dim and of the prefix slots.

    Mathematically those are one problem, but every order rounds differently, and a single draw is often a lucky one.
    """
    generator = torch.Generator().manual_seed(0)

    def orders(size: int) -> list[Tensor]:
        more = 3 if dtype == torch.float32 else 0
        return [torch.arange(size), *(torch.randperm(size, generator=generator) for _ in range(more))]

    prefix_key = problem.tensors["prefix_key"]
    slots = 0 if prefix_key is None else prefix_key.shape[2]
    base = dict.fromkeys(exact, 0.0)
    for order, slot_order in zip(orders(exact["output"].shape[-1]), orders(slots), strict=True):

        def reordered(name: str, tensor: Tensor, order: Tensor = order, slot_order: Tensor = slot_order) -> Tensor:
            if name.removeprefix("d") == "gate":
                return tensor
            if name.removeprefix("d") in ("prefix_key", "prefix_value"):
                tensor = tensor[:, :, slot_order.to(tensor.device)]
            return tensor[..., order.to(tensor.device)]

        def leaf(name: str, tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else reordered(name, tensor.detach()).requires_grad_(tensor.requires_grad)

        tensors = {name: leaf(name, tensor) for name, tensor in problem.tensors.items()}
        doutput = leaf("doutput", problem.doutput)
        eager = _truth(Problem(problem.case, tensors, problem.arguments, doutput), "reference")
        for name, result in eager.items():
            want = reordered(name, exact[name])
            if want.numel() > 0:
                base[name] = max(base[name], (result.cpu().double() - want).abs().max().item())
    return base


def deviations(problem: Problem, results: dict[str, Tensor], truth: Truth | None = None) -> list[Deviation]:
    """Applies the rule to results {"output", "dquery", ...} (computed from `problem`'s own tensors)."""
    truth = truth_of(problem) if truth is None else truth
    return [deviation(name, result, truth) for name, result in results.items() if truth.exact[name].numel() > 0]


def deviation(name: str, result: Tensor, truth: Truth) -> Deviation:
    """Applies the rule to one result."""
    exact, dtype = truth.exact[name], truth.dtype
    eps = torch.finfo(dtype).eps
    error = (result.detach().to("cpu", torch.float64) - exact).abs().max().item()
    base = truth.base[name]
    size = exact.abs().max().item()
    # A softmax over one key has a gradient of zero: dP - D, rounded, is all that is left.
    vanishes = size < 1e-7 * truth.score_summands and name in ("dquery", "dkey", "dprefix_key")
    floor = eps * (truth.score_summands if vanishes else size)
    # The gate gradient is one long sum, in float32 whatever the inputs are: its floor is that of the summands, not of a
    # result in which they may cancel.
    if name == "dgate":
        floor = max(floor, min(eps, torch.finfo(torch.float32).eps) * truth.gate_summands)
    # Eager PyTorch saves probabilities, the kernels the rounded output.
    if name in ("dquery", "dkey"):
        floor += eps * truth.saved_output
    limit = 2 * base + 2 * floor
    if dtype == torch.float64:  # nothing more exact to compare with: two correct results differ by some roundings
        limit = 32 * floor
    if dtype == torch.float32 and name != "dgate":
        limit = min(limit, max(1e-5 * size, 2 * floor))
    return Deviation(name, error, base, limit, error / size if size else error)


def _gate_summands(problem: Problem) -> float:
    """Euclidean norm of what dgate adds up, over everything: |dO| times the prefix's weighted mean of |Vp|."""
    query = problem.tensors["query"]
    assert query is not None
    exact = problem.to(torch.float64, query.device)
    with torch.no_grad():
        plain = replace(problem.case, prefix="none")
        without = Problem(plain, exact.tensors | dict.fromkeys(("prefix_key", "prefix_value", "gate")),
                          {k: v for k, v in exact.arguments.items() if k != "prefix_index"})  # fmt: skip
        ones, values = exact.tensors["gate"], exact.tensors["prefix_value"]
        assert ones is not None and values is not None
        unit = {"gate": torch.ones_like(ones), "prefix_value": values.abs()}
        with_unit_gate = Problem(exact.case, exact.tensors | unit, exact.arguments)
        assert exact.doutput is not None
        prefix_output = with_unit_gate.forward("reference") - without.forward("reference")
        summands: float = (exact.doutput * prefix_output).norm().item()
        return summands


def assert_matches_reference(problem: Problem, backend: str, gradients: bool = True) -> None:
    """Runs `backend` on the problem and applies the rule to its output and gradients.

    Raises:
        AssertionError: names each result outside of the rule with its error.
    """
    output = problem.forward(backend)
    results = {"output": output}
    if gradients:
        results |= {f"d{name}": gradient for name, gradient in problem.backward(output).items()}
    bad = [str(deviation) for deviation in deviations(problem, results) if not deviation.ok]
    if bad:
        raise AssertionError(f"{problem.case.name} {output.dtype} {backend}:\n  " + "\n  ".join(bad))
