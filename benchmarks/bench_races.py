"""The races of `llama-adapter bench` through pytest-benchmark: its tables, its history and its comparisons.

    pytest benchmarks                         # every case and contestant
    pytest benchmarks -m quick -k decode      # what --quick runs, one question: attention, varlen, decode, module, ...
    pytest benchmarks -m quick --benchmark-autosave --benchmark-compare

The selected contestants of a race are checked and timed together, taking turns, when the first of them is asked for.
pytest-benchmark is handed their samples: its clock stands still but for the seconds that were measured.
"""

import os

import pytest
import torch

from llama_adapter_kernels.bench import runner
from llama_adapter_kernels.bench.cases import cases
from llama_adapter_kernels.bench.measure import FULL, QUICK, Timing, clock_for, race
from llama_adapter_kernels.bench.results import Measurement
from llama_adapter_kernels.bench.runner import Plan
from llama_adapter_kernels.bench.workload import make_workload
from llama_adapter_kernels.versions import commit

DEVICE = torch.device(os.environ.get("BENCH_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu"))


class Replay:
    """A clock that is moved by hand."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


REPLAY = Replay()


def parameters() -> list[object]:
    """(race, contestant) of every race. The sweep over lengths belongs to the command, its plots are made there."""
    chosen = [case for case in cases(DEVICE.type).values() if not (case.sweep and case.name != "llama-7b")]
    return [
        pytest.param(
            plan, peer.name, id=f"{plan.case.question}-{plan.name.replace(' ', '-')}-{peer.name}",
            marks=[pytest.mark.quick] if plan.case.quick and peer.quick else [],
        )
        for plan in runner.plan(chosen) for peer in runner.peers_of(plan.case)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def races(request: pytest.FixtureRequest):
    """A function from a race to (measurements, timings) by contestant; the race before is forgotten."""
    selected: dict[Plan, list[str]] = {}
    for item in request.session.items:
        selected.setdefault(item.callspec.params["plan"], []).append(item.callspec.params["peer"])
    clock = clock_for(DEVICE)
    latest: dict[Plan, tuple[dict[str, Measurement], dict[str, Timing]]] = {}

    def run(plan: Plan) -> tuple[dict[str, Measurement], dict[str, Timing]]:
        if plan not in latest:
            latest.clear()
            workload = make_workload(plan.case, plan.mode, plan.dtype, DEVICE)
            entrants = [peer for peer in workload.peers if peer.name in selected[plan]]
            found, calls = runner.admit_all(workload, entrants)
            timings, failed = race(calls, clock, QUICK if plan.case.quick else FULL, plan.case.cold)
            runner.enter(found, timings, failed)
            latest[plan] = found, timings
        return latest[plan]

    return run


@pytest.mark.benchmark(timer=REPLAY)
@pytest.mark.parametrize(("plan", "peer"), parameters())
def bench(plan: Plan, peer: str, benchmark, races) -> None:
    found, timings = races(plan)
    entry = found[peer]
    if entry.status == "wrong":
        pytest.fail(entry.reason)
    if peer not in timings:
        pytest.skip(entry.reason)
    benchmark.group = plan.name
    benchmark.extra_info.update(flop=entry.flop, bytes=entry.bytes, commit=commit())
    samples = iter(timings[peer].samples)
    benchmark.pedantic(lambda: REPLAY.advance(next(samples)), rounds=timings[peer].rounds)
