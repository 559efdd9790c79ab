"""Runs the races: every contestant is checked against the reference first, then those that are right are timed."""

import gc
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import torch

from llama_adapter_kernels.bench import ceilings, machine, reasons
from llama_adapter_kernels.bench.cases import PREFIX_LENGTH, BenchCase, Mode
from llama_adapter_kernels.bench.measure import Budget, CpuClock, CudaClock, clock_for, race
from llama_adapter_kernels.bench.peer import Peer
from llama_adapter_kernels.bench.results import Measurement, Results
from llama_adapter_kernels.bench.workload import Workload, make_workload, workloads
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


def plan(chosen: list[BenchCase], device: torch.device, dtypes: list[str] | None = None) -> list[Plan]:
    return [Plan(case, mode, dtype) for case in chosen for mode, dtype in workloads(case, device, dtypes)]


def known_peers(device: torch.device) -> dict[str, str]:
    """{name: label} of every contestant in any race; where one means different things, its first label."""
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


def check_peers(names: list[str] | None, device: torch.device) -> None:
    """
    Raises:
        ValueError: an unknown name; the message lists the known ones.
    """
    known = known_peers(device)
    for name in names or ():
        if name not in known:
            raise ValueError(f"peer: expected one of {', '.join(known)}; got {name!r}")


def start(device: torch.device, budget: Budget, dtypes: tuple[str, ...], clock: CpuClock | CudaClock) -> Results:
    """A result file without races: the machine and its ceilings."""
    method = {"clock": clock.method, "order": "interleaved, shuffled every round", "figure": "median over rounds",
              "seconds_per_race": budget.seconds, "rounds": [budget.least_rounds, budget.most_rounds]}  # fmt: skip
    recorded = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    rates = ceilings.measure(device, dtypes, clock)
    return Results(machine.facts(device), method, rates, recorded)  # facts after work: an idle machine's clocks are low


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
    found: dict[str, Measurement] = {}
    calls: dict[str, Callable[[], object]] = {}
    for peer in entrants:
        entry = blank(workload, peer)
        found[peer.name] = entry
        call = admit(workload, peer, entry)
        if call is not None:
            calls[peer.name] = call
    timings, failed = race(calls, clock, budget, workload.case.cold)
    for name, reason in failed.items():
        found[name].reason = reason
    for name, timing in timings.items():
        entry = found[name]
        entry.status, entry.reason = "timed", timing.note
        entry.median, entry.quartiles = timing.median, (timing.first_quartile, timing.third_quartile)
        entry.rounds, entry.repeats = timing.rounds, timing.repeats
        entry.peak_memory = clock.peak_memory(calls[name])
    return list(found.values())


def admit(workload: Workload, peer: Peer[Any], entry: Measurement) -> Callable[[], object] | None:
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


__all__ = ["Plan", "admit", "blank", "check_peers", "clock_for", "known_peers", "machine", "peers_of", "plan", "run",
           "run_race", "start"]  # fmt: skip
