"""Runs the races: every contestant is checked against the reference first, then those that are right are timed."""

import gc
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import torch

from llama_adapter_kernels.bench import analysis, ceilings, machine, reasons
from llama_adapter_kernels.bench.cases import PREFIX_LENGTH, BenchCase, Mode
from llama_adapter_kernels.bench.measure import Budget, Call, CpuClock, CudaClock, Timing, race
from llama_adapter_kernels.bench.peer import Peer
from llama_adapter_kernels.bench.results import Measurement, Results
from llama_adapter_kernels.bench.workload import Workload, make_workload
from llama_adapter_kernels.testing import Deviation

# A sweep over lengths draws these; the rest would only make it longer.
SWEEP_PEERS = ("sdpa", "two-sdpa", "eager", "ours-cpu", "ours-cpu-p0", "ours-cuda", "ours-cuda-p0", "ours-triton",
               "ours-triton-p0")  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """One race to come."""

    case: BenchCase
    mode: Mode
    dtype: str

    @property
    def name(self) -> str:
        return f"{self.case.name} {self.mode} {self.dtype}"


def plan(chosen: list[BenchCase], dtypes: list[str] | None = None) -> list[Plan]:
    """Every race of the cases, in the dtypes asked for."""
    return [
        Plan(case, mode, dtype)
        for case in chosen for dtype in case.dtypes if not dtypes or dtype in dtypes for mode in case.modes
    ]  # fmt: skip


def known_peers() -> dict[str, str]:
    """{name: label} of every contestant in any race. A name that means different things has its first label."""
    from llama_adapter_kernels.bench import attention_peers, model_peers, packed_peers

    tables: list[Peer[Any]] = [
        *attention_peers.ATTENTION,
        *packed_peers.PACKED,
        *attention_peers.DECODE,
        *model_peers.MODEL,
    ]
    found: dict[str, str] = {}
    for peer in tables:
        found.setdefault(peer.name, peer.label)
    return found


def peers_of(case: BenchCase) -> list[Peer[Any]]:
    """The contestants of a case."""
    from llama_adapter_kernels.bench import attention_peers, model_peers, packed_peers

    tables: dict[str, list[Peer[Any]]] = {"attention": attention_peers.ATTENTION, "varlen": packed_peers.PACKED,
                                          "decode": attention_peers.DECODE}  # fmt: skip
    return tables.get(case.question, model_peers.MODEL)


def start(device: torch.device, budget: Budget, plans: list[Plan], clock: CpuClock | CudaClock) -> Results:
    """A result file without races: the machine and its ceilings for the dtypes of the plans."""
    method = {"clock": clock.method, "order": "interleaved, shuffled every round", "figure": "median over rounds",
              "seconds_per_race": budget.seconds, "rounds": [budget.least_rounds, budget.most_rounds]}  # fmt: skip
    recorded = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    rates = ceilings.measure(device, ceiling_dtypes(plans), clock)
    return Results(
        machine.facts(device), method, rates, recorded
    )  # facts come after work: the clocks of an idle machine are low


def ceiling_dtypes(plans: list[Plan]) -> list[str]:
    """float32 always: where 16-bit products are slower, its rate is the ceiling of all."""
    return list(dict.fromkeys(["float32", *(item.dtype for item in plans)]))


def finish(found: Results, device: torch.device, clock: CpuClock | CudaClock) -> None:
    """Measures the ceilings again where a contestant went beyond them: the machine was busy when they were measured."""
    if analysis.trusted_ceilings(found) != found.ceilings:
        dtypes = [name.removeprefix("gemm_") for name in found.ceilings if name.startswith("gemm_")]
        for name, rate in ceilings.measure(device, dtypes, clock).items():
            found.ceilings[name] = max(rate, found.ceilings[name])


def run(
    plans: list[Plan], device: torch.device, budget: Budget, clock: CpuClock | CudaClock,
    peers: list[str] | None = None, quick: bool = False,
) -> Iterator[list[Measurement]]:  # fmt: skip
    """Yields the measurements of one race after the other."""
    for item in plans:
        workload = make_workload(item.case, item.mode, item.dtype, device)
        yield run_race(workload, _entrants(workload, peers, quick), budget, clock)
        del workload
        gc.collect()


def run_race(
    workload: Workload, entrants: list[Peer[Any]], budget: Budget, clock: CpuClock | CudaClock
) -> list[Measurement]:
    """Checks, then times; a contestant that is wrong or cannot run is reported as that."""
    found, calls = admit_all(workload, entrants)
    timings, failed = race(calls, clock, budget, workload.case.cold)
    enter(found, timings, failed)
    for name in timings:
        found[name].peak_memory = clock.peak_memory(calls[name])
    return list(found.values())


def enter(found: dict[str, Measurement], timings: dict[str, Timing], failed: dict[str, str]) -> None:
    """Writes what `race` returned into the measurements of its contestants."""
    for name, entry in found.items():
        if name in timings:
            timing = timings[name]
            entry.status, entry.reason = "timed", timing.note
            entry.median, entry.quartiles = timing.median, (timing.first_quartile, timing.third_quartile)
            entry.rounds, entry.repeats = timing.rounds, timing.repeats
        elif name in failed:
            entry.reason = failed[name]


def admit_all(workload: Workload, entrants: list[Peer[Any]]) -> tuple[dict[str, Measurement], dict[str, Call]]:
    """By name: the measurements to come of all entrants, and the calls of those that run and are right."""
    found = {peer.name: blank(workload, peer) for peer in entrants}
    admitted = {peer.name: admit(workload, peer, found[peer.name]) for peer in entrants}
    return found, {name: call for name, call in admitted.items() if call is not None}


def admit(workload: Workload, peer: Peer[Any], entry: Measurement) -> Call | None:
    """The call to be timed, if the peer runs and computes what the reference does; else why not, in `entry`."""
    reason = workload.reason(peer)
    if reason is not None:
        entry.reason = reason
        return None
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            prepared = workload.prepare(peer)
            deviations = workload.check(peer, prepared)
        except Exception as error:  # a foreign library's reason, whatever its type
            entry.reason = reasons.why(error, [str(warning.message) for warning in said])
            return None
    wrong = [str(deviation) for deviation in deviations if not _equal(deviation, peer, workload)]
    if wrong:
        entry.status, entry.reason = "wrong", "differs from the reference: " + "; ".join(wrong)
        return None
    entry.worst_error = max((item.error / item.limit for item in deviations if item.limit), default=0.0)
    return workload.call(prepared)


def _equal(deviation: Deviation, peer: Peer[Any], workload: Workload) -> bool:
    """The rule of `testing` for ours. In float32 others pass by its other bound alone too, 1e-5 of the result's size:
    an order of summation that eager code does not use is no other result.
    """
    lenient = not peer.ours and workload.dtype == "float32"
    return deviation.ok or (lenient and deviation.relative <= 1e-5)


def blank(workload: Workload, peer: Peer[Any]) -> Measurement:
    """A measurement without a time."""
    work, case = workload.work(peer.prefix), workload.case
    return Measurement(
        case=case.name, title=case.title, question=case.question, mode=workload.mode, dtype=workload.dtype,
        shape=case.shape, sweep=case.sweep, peer=peer.name, label=peer.label, ours=peer.ours,
        prefix_length=PREFIX_LENGTH if peer.prefix else 0, status="unavailable", flop=work.flop, bytes=work.bytes,
    )  # fmt: skip


def _entrants(workload: Workload, names: list[str] | None, quick: bool) -> list[Peer[Any]]:
    if names:
        return [peer for peer in workload.peers if peer.name in names]
    if quick:
        return [peer for peer in workload.peers if peer.quick]
    if workload.case.sweep is not None and workload.case.name != "llama-7b":
        return [peer for peer in workload.peers if peer.name in SWEEP_PEERS]
    return list(workload.peers)
