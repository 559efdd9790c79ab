"""Contestants compute what the reference does; one that does not is reported as wrong and never timed."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from llama_adapter_kernels import testing
from llama_adapter_kernels.bench import attention_peers, ceilings, model_peers, packed_peers, runner
from llama_adapter_kernels.bench.cases import BenchCase, ModelShape
from llama_adapter_kernels.bench.measure import Budget, CpuClock
from llama_adapter_kernels.bench.peer import Peer, Prepared
from llama_adapter_kernels.bench.workload import AttentionWorkload, make_workload, where_it_fits

CPU = torch.device("cpu")
SMALL = {
    "attention": BenchCase("small", "small", "attention", testing.Case(seq_q=65, seq_k=65, layout="bshd")),
    "padded": BenchCase("small", "small", "attention", testing.Case(seq_q=33, seq_k=33, is_causal=False),
                        key_lengths=(33, 20)),
    "varlen": BenchCase("small", "small", "varlen", testing.Case(lengths=((5, 5), (40, 40), (17, 17)))),
    "decode": BenchCase("small", "small", "decode", testing.Case(seq_q=1, seq_k=50), key_lengths=(50, 31)),
}  # fmt: skip
SHAPE = ModelShape(hidden=64, heads_q=4, heads_kv=2, head_dim=16, layers=1, batch=2, sequence=24, vocabulary=64)
MODELS = {
    "module": (BenchCase("small", "small", "module", model=SHAPE), "forward+backward"),
    "token": (BenchCase("small", "small", "module", model=replace(SHAPE, sequence=1, cached=9)), "forward"),
    "training": (BenchCase("small", "small", "training", model=replace(SHAPE, layers=2, lengths=(24, 11))), "step"),
    "generation": (
        BenchCase("small", "small", "generation", model=replace(SHAPE, layers=2, sequence=1, cached=9)),
        "token",
    ),
}
# flex_attention is compiled: half a minute of the C++ compiler per shape. `llama-adapter bench` checks it too.
SLOW = {"flex"}


def admitted(workload, peer) -> tuple[object, runner.Measurement]:
    entry = runner.blank(workload, peer)
    return runner.admit(workload, peer, entry), entry


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", SMALL)
def test_attention_contestants(kind: str, dtype: str) -> None:
    case = SMALL[kind]
    for mode in case.modes:
        workload = make_workload(case, mode, dtype, CPU)
        for peer in workload.peers:
            if peer.name in SLOW:
                continue
            call, entry = admitted(workload, peer)
            assert entry.status != "wrong", (peer.name, entry.reason)
            if workload.reason(peer) is None:
                assert call is not None, (peer.name, entry.reason)
                call()


@pytest.mark.parametrize("kind", MODELS)
def test_model_contestants(kind: str) -> None:
    case, mode = MODELS[kind]
    workload = make_workload(case, mode, "float32", CPU)
    for peer in workload.peers:
        call, entry = admitted(workload, peer)
        assert entry.status != "wrong", (peer.name, entry.reason)
        if workload.reason(peer) is None:
            assert call is not None, (peer.name, entry.reason)
            call()


def test_a_cpu_without_bfloat16_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """There a call of what multiplies matrices in bfloat16 takes minutes; attention kernels convert, they take part."""
    monkeypatch.setattr(ceilings, "product_rates", lambda: {"float32": 1e5, "bfloat16": 1e3})
    workload = make_workload(SMALL["attention"], "forward", "bfloat16", CPU)
    refused = {peer.name for peer in workload.peers if "bfloat16 matrices" in (workload.reason(peer) or "")}
    assert refused == {"eager", "two-sdpa-math", "ours-reference", "ours-reference-p0"}
    case, mode = MODELS["module"]
    model = make_workload(case, mode, "bfloat16", CPU)
    assert all(model.reason(peer) for peer in model.peers)
    # A busy machine is slow in float32 too, and nothing is left out for that; nor where the calls are short anyway.
    for rates in ({"float32": 2e3, "bfloat16": 1e3}, {"float32": 1e14, "bfloat16": 1e12}):
        monkeypatch.setattr(ceilings, "product_rates", lambda rates=rates: rates)
        assert not any("matrices" in (workload.reason(peer) or "") for peer in workload.peers)


def test_truth_that_does_not_fit_is_computed_on_the_cpu() -> None:
    tried = []

    def truth(device: torch.device) -> str:
        tried.append(device.type)
        if device.type == "cuda":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return "truth"

    assert where_it_fits(truth, torch.device("cuda")) == "truth"
    assert tried == ["cuda", "cpu"]


def test_flex_is_compiled_for_every_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch compiles one function for so many shapes, then runs it uncompiled: the tenth race once timed that."""
    compilations = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        compilations.append(graph)
        return graph.forward

    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiler(function, backend=backend, **options))
    flex = {peer.name: peer for peer in attention_peers.ATTENTION}["flex"]
    with torch._dynamo.config.patch(recompile_limit=2):
        for length in (16, 17, 18, 19):
            problem = testing.make_problem(testing.Case(batch=1, seq_q=length, seq_k=length))
            with torch.no_grad():
                flex.prepare(problem, False).call()
    assert len(compilations) == 4


def wrong_peer(problem: testing.Problem, backward: bool) -> Prepared:
    right = attention_peers.ATTENTION[1].prepare(problem, backward)

    def call() -> Tensor:
        return right.call() * 1.01

    return Prepared(call, right.leaves, right.doutput)


def broken_peer(problem: testing.Problem, backward: bool) -> Prepared:
    raise RuntimeError("no kernel for this card\nand a long trace")


def test_wrong_is_reported_and_not_timed() -> None:
    workload = AttentionWorkload(SMALL["attention"], "forward", "float32", CPU)
    peers = [Peer("wrong", "wrong", wrong_peer), Peer("broken", "broken", broken_peer), workload.peers[1]]
    wrong, broken, right = runner.run_race(workload, peers, Budget(0.01, 3, 3), CpuClock())
    assert wrong.status == "wrong"
    assert wrong.median is None
    assert "output: error" in wrong.reason
    assert broken.status == "unavailable"
    assert broken.reason == "RuntimeError: no kernel for this card"
    assert right.status == "timed"
    assert right.rounds == 3
    assert right.quartiles[0] <= right.median <= right.quartiles[1]


def test_a_prefix_left_out_is_wrong() -> None:
    """The mistake that is invisible while gates are zero: the cases' gates are not."""
    workload = AttentionWorkload(SMALL["attention"], "forward", "bfloat16", CPU)
    plain = replace(workload.peers[0], prefix=True, prepare=lambda problem, backward: Prepared(
        lambda: attention_peers.two_calls(problem.tensors["query"], problem.tensors["key"], problem.tensors["value"],
                                          None, None, None, attn_mask=None, is_causal=True), {}, None))  # fmt: skip
    assert admitted(workload, plain)[1].status == "wrong"


def test_nan_is_wrong() -> None:
    workload = AttentionWorkload(SMALL["attention"], "forward", "float32", CPU)
    right = workload.peers[1]

    def prepare(problem: testing.Problem, backward: bool) -> Prepared:
        prepared = right.prepare(problem, backward)
        return Prepared(lambda: prepared.call() * torch.nan, prepared.leaves, prepared.doutput)

    assert admitted(workload, Peer("nan", "nan", prepare))[1].status == "wrong"


def test_every_issue_contestant_is_there() -> None:
    names = {peer.name for peer in attention_peers.ATTENTION}
    assert {"sdpa", "eager", "flex", *(f"two-sdpa-{b}" for b in ("flash", "cudnn", "efficient", "math"))} <= names
    assert {"ours-cpu", "ours-cpu-p0", "ours-cuda", "ours-triton", "ours-reference-p0"} <= names
    packed = {peer.name for peer in packed_peers.PACKED}
    assert {"two-varlen", "two-sdpa-512", "flex", *(f"two-sdpa-{b}" for b in attention_peers.SDPA_BACKENDS)} <= packed
    assert {"sdpa", "two-sdpa", "eager", "flex", "ours-cpu-p0"} <= {peer.name for peer in attention_peers.DECODE}
    assert {"peft", "ours-cpu", "ours-cpu-p0", "ours-cuda-p0"} <= {peer.name for peer in model_peers.MODEL}


def test_who_cannot_run_here_says_why() -> None:
    for kind in SMALL:
        workload = make_workload(SMALL[kind], "forward", "float32", CPU)
        reasons = {peer.name: workload.reason(peer) for peer in workload.peers}
        for name in ("two-sdpa-flash", "two-sdpa-cudnn", "two-sdpa-efficient", "ours-cuda"):
            assert reasons[name], (kind, name)
        assert not reasons["two-sdpa"], kind
        assert not reasons["ours-cpu"], kind
