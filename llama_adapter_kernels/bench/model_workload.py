"""Races of attention modules and training steps."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from llama_adapter_kernels import testing
from llama_adapter_kernels.bench import model_peers
from llama_adapter_kernels.bench.cases import PREFIX_LENGTH, BenchCase, Mode
from llama_adapter_kernels.bench.model_problem import ModelProblem, build_model, make_model_problem
from llama_adapter_kernels.bench.peer import Peer, Prepared
from llama_adapter_kernels.bench.work import Work, model_work
from llama_adapter_kernels.bench.workload import Workload, where_it_fits
from llama_adapter_kernels.testing import Deviation, Truth

# Recorded while the float64 model runs: per layer, the norm of the products that the gate's gradient adds up.
_gate_summands: list[float] = []


class ModelWorkload(Workload):
    """Modules: output and gradients. Training: forward, backward and an AdamW step on prompts and gates."""

    def __init__(self, case: BenchCase, mode: Mode, dtype: str, device: torch.device) -> None:
        super().__init__(case, mode, dtype, device)
        assert case.model is not None
        self.peers = list(model_peers.MODEL)
        problem = make_model_problem(case.model, mode, getattr(torch, dtype), device)
        self._problems = {True: problem, False: replace(problem, prefix=False)}
        self._truth = cache(self._compute_truth)

    def problem(self, prefix: bool) -> ModelProblem:
        return self._problems[prefix]

    def work(self, prefix: bool) -> Work:
        assert self.case.model is not None
        width = getattr(torch, self.dtype).itemsize
        return model_work(self.case.model, self.mode, width, PREFIX_LENGTH if prefix else 0)

    def call(self, prepared: Prepared) -> Callable[[], object]:
        if self.mode != "step":
            return super().call(prepared)
        trained = [leaf for name, leaf in prepared.leaves.items() if name != "hidden"]
        # With a learning rate of zero the work is the same as with any other, and every step is the same step. On a GPU
        # the optimizer must be told that it will be captured in a graph.
        capturable = self.device.type == "cuda"
        optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.02, capturable=capturable) if trained else None
        wanted = list(prepared.leaves.values())

        def step() -> object:
            for leaf in wanted:
                leaf.grad = None
            loss = prepared.call()
            loss.backward(inputs=wanted)
            if optimizer is not None:
                optimizer.step()
            return loss

        return step

    def check(self, peer: Peer[ModelProblem], prepared: Prepared) -> list[Deviation]:
        truth = self._truth(peer.prefix)
        results = _results(prepared, self.backward)
        if self.mode == "step":  # padding differs between contestants; what counts are the adapter's gradients
            results.pop("dhidden", None)
        found = []
        for name, result in results.items():
            deviation = testing.deviation(name, result, truth)  # a NaN in the result makes its error NaN
            if name == "dgate" and truth.dtype == torch.float32:
                # With one number per layer, twice the error of eager is a matter of luck. 1e-5 is the rule's other bound.
                limit = max(deviation.limit, 1e-5 * truth.exact[name].abs().max().item())
                deviation = replace(deviation, limit=limit)
            found.append(deviation)
        return found

    def _compute_truth(self, prefix: bool) -> Truth:
        problem = self._problems[prefix]

        def truth(device: torch.device) -> Truth:
            _gate_summands.clear()
            exact = self._reference(problem.to(torch.float64, device))
            summands = max(_gate_summands, default=0.0)
            eager = self._reference(problem.to(problem.dtype, device))
            base = {name: (eager[name] - want).abs().max().item() for name, want in exact.items()}
            return Truth(problem.dtype, exact, base, summands)

        return where_it_fits(truth, self.device)

    def _reference(self, problem: ModelProblem) -> dict[str, Tensor]:
        model = build_model(problem, model_peers.register("bench-truth", _recording_reference))
        if not problem.prefix:
            problem = replace(problem, gates=torch.zeros_like(problem.gates))  # a gate of zero: no prefix
        leaves = model_peers.attach(model, problem)
        if not problem.prefix and problem.mode == "step":
            output = model_peers.finish(model, problem, leaves).call()
            return {"output": output.detach().to("cpu", torch.float64)}
        results = _results(model_peers.finish(model, problem, leaves), self.backward)
        return {name: result.to("cpu", torch.float64) for name, result in results.items()}


def _recording_reference(*arguments: Any) -> Tensor:
    output = model_peers.ours("reference")(*arguments)
    query, key, value, prefix_key, prefix_value, gate, *rest = arguments
    if output.requires_grad and query.dtype == torch.float64:
        with torch.no_grad():  # linear in the gate: one minus zero is the prefix's own output
            one, zero = (
                model_peers.ours("reference")(query, key, value, prefix_key, prefix_value, gate_value, *rest)
                for gate_value in (torch.ones_like(gate), torch.zeros_like(gate))
            )
            prefix_output = one - zero
        output.register_hook(lambda doutput: _gate_summands.append((doutput * prefix_output).norm().item()))
    return output


def _results(prepared: Prepared, backward: bool) -> dict[str, Tensor]:
    """{"output", "dhidden", "dprompt" [L, P, C], "dgate" [L]}, as far as there are leaves for them."""
    with torch.set_grad_enabled(backward):
        output = prepared.call()
    results = {"output": output.detach()}
    if backward:
        gradients = torch.autograd.grad(output, list(prepared.leaves.values()), prepared.doutput)
        by_leaf = dict(zip(prepared.leaves, gradients, strict=True))
        if "hidden" in by_leaf:
            results["dhidden"] = by_leaf.pop("hidden")
        for kind in ("prompt", "gate"):
            found = [gradient for name, gradient in by_leaf.items() if name.startswith(kind)]
            if found and kind == "prompt":
                results["dprompt"] = torch.stack([gradient.reshape(gradient.shape[-2:]) for gradient in found])
            elif found:
                results["dgate"] = torch.stack([gradient.reshape(()) for gradient in found])
    return results
