"""Random problems and the tolerance rule that every backend is held to. Tests and benchmarks share this file.

The rule is FlashAttention's: compare with the reference in float64, and allow twice the error that eager PyTorch makes in
the dtype under test, plus twice the rounding of the result itself.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from llama_adapter_kernels.ops import reference
from llama_adapter_kernels.ops.attention import zero_gate_attention, zero_gate_attention_varlen

DIFFERENTIABLE = ("query", "key", "value", "prefix_key", "prefix_value", "gate")


@dataclass(frozen=True)
class Case:
    """One problem. `lengths` (pairs of query and key lengths) makes it a packed (varlen) problem."""

    batch: int = 2
    heads_q: int = 4
    heads_kv: int = 2
    seq_q: int = 33
    seq_k: int = 33
    head_dim: int = 32
    prefix_length: int = 10
    prefix: Literal["shared", "sequence", "table", "none"] = "shared"
    gate: Literal["scalar", "head", "prefix"] = "head"
    is_causal: bool = True
    window: Literal["none", "start", "end", "both"] = "none"
    mask: Literal["none", "bool", "float", "row"] = "none"
    layout: Literal["bhsd", "bshd", "padded"] = "bhsd"
    lengths: tuple[tuple[int, int], ...] | None = None
    scale: float | None = None
    seed: int = 0

    @property
    def name(self) -> str:
        default = Case()
        shape = f"b{self.batch}h{self.heads_q}-{self.heads_kv}s{self.seq_q}-{self.seq_k}d{self.head_dim}"
        shape += f"p{self.prefix_length}"
        other = ("prefix", "gate", "is_causal", "window", "mask", "layout", "lengths", "scale", "seed")
        return "_".join([shape, *(f"{f}={getattr(self, f)}" for f in other if getattr(self, f) != getattr(default, f))])


@dataclass
class Problem:
    """Tensors of one case, and the keyword arguments that go with them."""

    case: Case
    tensors: dict[str, Tensor | None]
    arguments: dict[str, Any] = field(default_factory=dict)
    doutput: Tensor | None = None

    def to(self, dtype: torch.dtype, device: str | torch.device = "cpu") -> "Problem":
        """The same values in another dtype (strides kept) as new leaves; the gate stays float32 unless dtype is float64."""

        def convert(name: str, tensor: Tensor | None) -> Tensor | None:
            if tensor is None:
                return None
            target = torch.float32 if name == "gate" and dtype != torch.float64 else dtype
            # Same strides, and NaN between the rows: a padded layout must stay one.
            size = tensor.untyped_storage().nbytes() // tensor.element_size()
            buffer = torch.full((size,), torch.nan, dtype=target, device=device)
            copy = buffer.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).copy_(tensor.detach())
            return copy.requires_grad_(tensor.requires_grad)

        arguments = {
            name: value.to(device) if isinstance(value, Tensor) else value for name, value in self.arguments.items()
        }
        doutput = None if self.doutput is None else self.doutput.to(device=device, dtype=dtype)
        return Problem(self.case, {n: convert(n, t) for n, t in self.tensors.items()}, arguments, doutput)

    def forward(self, backend: str) -> Tensor:
        attention = zero_gate_attention if self.case.lengths is None else zero_gate_attention_varlen
        arguments: dict[str, Any] = {**self.tensors, **self.arguments, "backend": backend}
        return attention(**arguments)

    def backward(self, output: Tensor) -> dict[str, Tensor]:
        """Gradients by name of every tensor that requires one; NaN-free reference for those that got none is zero."""
        wanted = {name: t for name, t in self.tensors.items() if t is not None and t.requires_grad}
        gradients = torch.autograd.grad(output, list(wanted.values()), self.doutput, allow_unused=True)
        return {
            name: torch.zeros_like(wanted[name]) if gradient is None else gradient
            for name, gradient in zip(wanted, gradients, strict=True)
        }


def make_problem(case: Case, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Problem:
    """Random normal inputs, non-zero gates, already rounded to `dtype`; every tensor requires a gradient."""
    generator = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    packed = case.lengths is not None
    batch = len(case.lengths) if case.lengths is not None else case.batch

    def sequence(heads: int, length: int, total: int) -> Tensor:
        if packed:
            tensor = normal(total, heads, case.head_dim)
        elif case.layout == "bhsd":
            tensor = normal(batch, heads, length, case.head_dim)
        elif case.layout == "bshd":  # what a projection followed by transpose(1, 2) gives
            tensor = normal(batch, length, heads, case.head_dim).transpose(1, 2)
        else:  # rows of a larger buffer; what lies between the rows is NaN and must never be used
            buffer = torch.full((batch, heads, length, case.head_dim + 8), torch.nan, dtype=torch.float64)
            tensor = buffer[..., : case.head_dim].copy_(normal(batch, heads, length, case.head_dim))
        return tensor

    total_q, total_k = (sum(pair[i] for pair in case.lengths or ()) for i in (0, 1))
    tensors: dict[str, Tensor | None] = {
        "query": sequence(case.heads_q, case.seq_q, total_q),
        "key": sequence(case.heads_kv, case.seq_k, total_k),
        "value": sequence(case.heads_kv, case.seq_k, total_k),
    }
    count = {"shared": 1, "sequence": batch, "table": 3, "none": 0}[case.prefix]
    arguments: dict[str, Any] = {"is_causal": case.is_causal, "scale": case.scale}
    if case.prefix == "none":
        tensors |= {"prefix_key": None, "prefix_value": None, "gate": None}
    else:
        tensors["prefix_key"] = normal(count, case.heads_kv, case.prefix_length, case.head_dim)
        tensors["prefix_value"] = normal(count, case.heads_kv, case.prefix_length, case.head_dim)
        shape = {"scalar": (), "head": (case.heads_q,), "prefix": (count, case.heads_q)}[case.gate]
        tensors["gate"] = normal(*shape) + 0.5
    if case.prefix == "table":  # -1 first: the sequence without a prefix; entry 2 may stay unused
        arguments["prefix_index"] = torch.tensor([(b % 3) - 1 for b in range(batch)], dtype=torch.int32)
    if packed:
        offsets = torch.tensor([(0, 0), *case.lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)  # type: ignore[misc]
        arguments |= {
            "cu_seqlens_q": offsets[:, 0].contiguous(),
            "cu_seqlens_k": offsets[:, 1].contiguous(),
            "max_seqlen_q": max((pair[0] for pair in case.lengths or ()), default=0),
            "max_seqlen_k": max((pair[1] for pair in case.lengths or ()), default=0),
        }

    def random_int(low: int, high: int) -> Tensor:
        return torch.randint(low, high + 1, (batch,), generator=generator, dtype=torch.int32)

    if case.window in ("end", "both"):
        arguments["key_end"] = random_int(0, case.seq_k)
    if case.window in ("start", "both"):
        arguments["key_start"] = random_int(0, max(case.seq_k // 2, 0))
    full = (batch, case.heads_q, case.seq_q, case.seq_k)
    if case.mask == "bool":
        arguments["attn_mask"] = torch.rand(full, generator=generator) < 0.7
    elif case.mask == "row":  # [B, 1, 1, Sk], some rows of the batch see nothing at all
        arguments["attn_mask"] = torch.rand(batch, 1, 1, case.seq_k, generator=generator) < 0.5
        arguments["attn_mask"][-1] = False
    elif case.mask == "float":
        arguments["attn_mask"] = torch.randn(1, *full[1:], generator=generator)
        arguments["attn_mask"][..., : case.seq_q // 3, :] = -torch.inf  # rows that see nothing
    for tensor in tensors.values():
        if tensor is not None:
            tensor.requires_grad_()
    query = tensors["query"]
    assert query is not None
    doutput = normal(*query.shape)
    return Problem(case, tensors, arguments, doutput).to(dtype).to(dtype, device)


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


__all__ = ["DIFFERENTIABLE", "Case", "Deviation", "Problem", "Truth", "assert_matches_reference", "deviation",
           "deviations", "make_problem", "reference", "truth_of"]  # fmt: skip
