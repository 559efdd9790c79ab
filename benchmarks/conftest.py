"""Fixtures of the pytest-benchmark files. Cases, contestants and checks are those of `llama-adapter bench`."""

import os
from collections.abc import Callable

import pytest
import torch

from llama_adapter_kernels.bench import cases, runner
from llama_adapter_kernels.bench.cases import Mode
from llama_adapter_kernels.bench.results import Measurement
from llama_adapter_kernels.bench.workload import Workload, make_workload

DEVICE = torch.device(os.environ.get("BENCH_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu"))


def parameters(question: str, mode: Mode) -> list[object]:
    """(case, dtype, contestant) of every race of a question, for parametrize. Sweeps belong to the command."""
    found = []
    for case in cases.cases(DEVICE.type).values():
        if case.question != question or mode not in case.modes or (case.sweep and case.name != "llama-7b"):
            continue
        for dtype in case.dtypes:
            for peer in runner.peers_of(case):
                mark = [pytest.mark.quick] if case.quick and peer.quick else []
                found.append(
                    pytest.param(case.name, dtype, peer.name, id=f"{case.name}-{dtype}-{peer.name}", marks=mark)
                )
    return found


@pytest.fixture(scope="session")
def workload() -> Callable[[str, Mode, str], Workload]:
    """Makes the workload of (case, mode, dtype); the latest one is kept, contestants of one race come together."""
    kept: dict[tuple[str, Mode, str], Workload] = {}

    def make(case: str, mode: Mode, dtype: str) -> Workload:
        key = (case, mode, dtype)
        if key not in kept:
            kept.clear()
            kept[key] = make_workload(cases.cases(DEVICE.type)[case], mode, dtype, DEVICE)
        return kept[key]

    return make


@pytest.fixture
def time_it(benchmark, workload) -> Callable[[str, Mode, str, str], None]:
    """Checks a contestant against the reference, then times it; skips with the reason of one that cannot run."""

    def run(case: str, mode: Mode, dtype: str, peer: str) -> None:
        race = workload(case, mode, dtype)
        contestant = {entry.name: entry for entry in race.peers}[peer]
        entry: Measurement = runner.blank(race, contestant)
        call = runner.admit(race, contestant, entry)
        if entry.status == "wrong":
            pytest.fail(entry.reason)
        if call is None:
            pytest.skip(entry.reason)

        def synchronized() -> None:
            call()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()

        benchmark.group = f"{case} {mode} {dtype}"
        benchmark.extra_info.update(flop=entry.flop, bytes=entry.bytes, commit=runner.machine.commit())
        benchmark(synchronized)

    return run
