"""One race: a case in one mode and dtype, with its contestants, what they must compute and how much work that is."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from llama_adapter_kernels import testing
from llama_adapter_kernels.bench import attention_peers, ceilings, packed_peers
from llama_adapter_kernels.bench.cases import INFERENCE, BenchCase, Mode
from llama_adapter_kernels.bench.peer import Peer, Prepared
from llama_adapter_kernels.bench.work import Work, attention_work
from llama_adapter_kernels.testing import Deviation, Problem, Truth

# Seconds that a call may take by the rate of matrix products: races have many contestants and rounds.
LONGEST_CALL = 2.0


class Workload(ABC):
    """A race. `peers` in the order of the tables."""

    peers: list[Peer[Any]]

    def __init__(self, case: BenchCase, mode: Mode, dtype: str, device: torch.device) -> None:
        self.case, self.mode, self.dtype, self.device = case, mode, dtype, device
        self.backward = mode not in INFERENCE

    @abstractmethod
    def problem(self, prefix: bool) -> Any:
        """What contestants are given; the same object every time."""

    @abstractmethod
    def work(self, prefix: bool) -> Work: ...

    @abstractmethod
    def check(self, peer: Peer[Any], prepared: Prepared) -> list[Deviation]:
        """Runs it once and compares with the reference in float64 (the rule of `testing`)."""

    def reason(self, peer: Peer[Any]) -> str | None:
        reason = peer.reason(self.problem(peer.prefix), self.backward)
        return self._products_reason(peer) if reason is None and peer.products else reason

    def _products_reason(self, peer: Peer[Any]) -> str | None:
        if self.device.type != "cpu" or ceilings.has_instructions(self.dtype):
            return None
        rate = ceilings.product_rates()[self.dtype]
        seconds = self.work(peer.prefix).flop / rate
        if seconds < LONGEST_CALL:
            return None
        measured = f"{rate / 1e9:.1f} GFLOP/s"
        return f"torch multiplies {self.dtype} matrices at {measured} on this CPU: a call takes seconds or minutes"

    def prepare(self, peer: Peer[Any]) -> Prepared:
        return peer.prepare(self.problem(peer.prefix), self.backward)

    def call(self, prepared: Prepared) -> Callable[[], object]:
        """What is timed: the forward pass, or the forward pass and the gradients of every leaf."""
        if not self.backward:
            forward: Callable[[], object] = torch.no_grad()(prepared.call)
            return forward
        wanted = list(prepared.leaves.values())

        def forward_and_backward() -> object:
            return torch.autograd.grad(prepared.call(), wanted, prepared.doutput)

        return forward_and_backward


class AttentionWorkload(Workload):
    """Attention, packed attention and decoding: one call of the operation."""

    def __init__(self, case: BenchCase, mode: Mode, dtype: str, device: torch.device) -> None:
        super().__init__(case, mode, dtype, device)
        assert case.problem is not None
        table = {"varlen": packed_peers.PACKED, "decode": attention_peers.DECODE}
        self.peers = list(table.get(case.question, attention_peers.ATTENTION))
        problem = testing.make_problem(case.problem, getattr(torch, dtype), device)
        if case.key_lengths is not None:
            problem.arguments["key_end"] = torch.tensor(case.key_lengths, dtype=torch.int32, device=device)
        if not self.backward:
            problem.doutput = None
        without = dict.fromkeys(("prefix_key", "prefix_value", "gate"))
        plain = Problem(replace(case.problem, prefix="none"), problem.tensors | without, problem.arguments,
                        problem.doutput)  # fmt: skip
        self._problems = {True: problem, False: plain}
        self._truth = cache(self._compute_truth)

    def problem(self, prefix: bool) -> Problem:
        return self._problems[prefix]

    def work(self, prefix: bool) -> Work:
        return attention_work(self._problems[prefix], self.mode)

    def check(self, peer: Peer[Problem], prepared: Prepared) -> list[Deviation]:
        with torch.set_grad_enabled(self.backward):
            output = prepared.call()
        results = {"output": output}
        if self.backward:
            gradients = torch.autograd.grad(output, list(prepared.leaves.values()), prepared.doutput)
            results |= {f"d{name}": tensor for name, tensor in zip(prepared.leaves, gradients, strict=True)}
        problem = self._problems[peer.prefix]
        truth = self._truth(peer.prefix)
        found = []
        for name, result in results.items():
            result = prepared.unpack(name, result.detach())
            if not torch.isfinite(result).all():
                found.append(Deviation(name, torch.nan, 0.0, 0.0, torch.nan))
            else:
                found.append(testing.deviation(name, _some_heads(name, result, problem), truth))
        return found

    def _compute_truth(self, prefix: bool) -> Truth:
        """Of two key/value heads, the first and the last: heads do not see each other, and float64 is slow."""
        problem = self._problems[prefix]
        tensors = {
            name: None if tensor is None else _some_heads(name, tensor.detach(), problem).requires_grad_(self.backward)
            for name, tensor in problem.tensors.items()
        }
        doutput = None if problem.doutput is None else _some_heads("doutput", problem.doutput, problem)
        chosen = Problem(problem.case, tensors, problem.arguments, doutput)
        return where_it_fits(lambda device: testing.truth_of(chosen, device), self.device)


def where_it_fits(truth: Callable[[torch.device], Truth], device: torch.device) -> Truth:
    """The truth computed on `device`, or on the CPU (minutes for a large case) where float64 takes more memory than
    there is.
    """
    try:
        return truth(device)
    except torch.OutOfMemoryError:
        if device.type != "cuda":
            raise
    torch.cuda.empty_cache()  # what the attempt took; out of the handler, whose exception still holds it
    return truth(torch.device("cpu"))


def _some_heads(name: str, tensor: Tensor, problem: Problem) -> Tensor:
    """Every other dimension is kept whole; the heads of query and gate are those of the two key/value heads."""
    group = problem.case.heads_q // problem.case.heads_kv
    chosen = sorted({0, problem.case.heads_kv - 1})
    name = name.removeprefix("d") if name != "doutput" else "output"
    if name in ("query", "gate", "output"):
        chosen = [group * head + i for head in chosen for i in range(group)]
    index = torch.tensor(chosen, device=tensor.device)
    return tensor.index_select(tensor.dim() - 1 if name == "gate" else 1, index)


def make_workload(case: BenchCase, mode: Mode, dtype: str, device: torch.device) -> Workload:
    if case.model is None:
        return AttentionWorkload(case, mode, dtype, device)
    from llama_adapter_kernels.bench.model_workload import ModelWorkload  # needs transformers

    return ModelWorkload(case, mode, dtype, device)
