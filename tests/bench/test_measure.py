"""Timing: what a race does with contestants that are slow or break, and the GPU clock on a stand-in for torch.cuda."""

import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from llama_adapter_kernels.bench import ceilings, measure, runner
from llama_adapter_kernels.bench.measure import FULL, QUICK, Budget, CpuClock, CudaClock, race
from tests.support.made_up_results import example


def breaks() -> None:
    raise RuntimeError("out of memory beside the others\nand a long trace")


def test_a_contestant_that_breaks_leaves_the_race() -> None:
    calls = {"breaks": breaks, "works": lambda: time.sleep(1e-4)}
    timings, failed = race(calls, CpuClock(), Budget(0.01, 3, 3))
    assert set(timings) == {"works"}
    assert failed == {"breaks": "RuntimeError: out of memory beside the others"}
    assert race({"breaks": breaks}, CpuClock(), Budget(0.01, 3, 3))[0] == {}


class MadeUpClock(CpuClock):
    """Calls return the seconds that they pretend to take: what is tested is the race, not how busy the machine is."""

    def sample(self, call: measure.Call, repeats: int, cold: bool) -> float:
        return call()


def test_slow_contestants_take_part_in_fewer_rounds() -> None:
    calls = {"fast": lambda: 2e-3, "slow": lambda: 3e-2}
    timings, _ = race(calls, MadeUpClock(), Budget(seconds=60, least_rounds=7, most_rounds=12))
    assert timings["fast"].rounds == 12
    assert timings["slow"].rounds == 3 + 2  # the first three, then every fourth: 4, 8
    assert timings["slow"].median == 3e-2


def test_what_takes_longer_than_the_race_is_timed_once() -> None:
    calls = {"fast": lambda: 1e-3, "endless": lambda: 0.1}
    timings, _ = race(calls, MadeUpClock(), Budget(seconds=0.02, least_rounds=3, most_rounds=4))
    assert timings["endless"].rounds == 1
    assert timings["endless"].spread == 0
    assert timings["endless"].median == 0.1
    assert timings["fast"].rounds >= 3


def test_the_wall_clock_measures_seconds() -> None:
    assert 0.02 <= CpuClock().sample(lambda: time.sleep(0.02), 1, cold=False) < 2.0


class Busy:
    """A clock on whose machine the first rounds are disturbed: every call takes other times than it needs."""

    def __init__(self, *seconds: float) -> None:
        self.seconds = iter(seconds)

    def begin(self) -> None:
        pass

    def ready(self, call: measure.Call) -> measure.Ready:
        return measure.Ready(call)

    def sample(self, call: measure.Call, repeats: int, cold: bool) -> float:
        return next(self.seconds)


def test_a_probe_goes_on_until_its_best_repeats_itself() -> None:
    """Six rounds on a busy machine once made a processor look as if it lacked instructions."""
    busy = Busy(0.9, 0.7, 0.8, 0.6, 0.75, 0.5, 0.104, 0.3, 0.10, 99.0)
    assert measure.undisturbed({"probe": lambda: None}, busy, longest=60) == {"probe": 0.10}
    quiet = Busy(0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 99.0)
    assert measure.undisturbed({"probe": lambda: None}, quiet, longest=60) == {"probe": 0.1}


def test_ceilings_that_were_exceeded_are_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    found = example()
    again = {"gemm_float32": 2e12, "copy": 1e9, "read": 3e10}
    monkeypatch.setattr(ceilings, "measure", lambda device, dtypes, clock: again)
    runner.finish(found, torch.device("cpu"), CpuClock())
    assert found.ceilings == example().ceilings  # nothing exceeded them
    found.ceilings["gemm_float32"] = 1e11
    runner.finish(found, torch.device("cpu"), CpuClock())
    assert found.ceilings == {"gemm_float32": 2e12, "copy": 1e10, "read": 3e10}


def test_limited_time_is_shared() -> None:
    assert measure.share(FULL, float("inf"), 10) == FULL
    assert measure.share(FULL, 60.0, 10).seconds == 3.0
    assert measure.share(FULL, 1.0, 10).seconds == QUICK.seconds


def test_peak_memory_of_one_call() -> None:
    clock = CpuClock()
    peak = clock.peak_memory(lambda: torch.ones(32 << 20, dtype=torch.uint8))
    if peak is None:
        pytest.skip("the system does not tell a process's peak memory")
    assert 30 << 20 < peak < 60 << 20


class FakeCuda:
    """As much of torch.cuda as the clock uses. A capture that fails leaves its stream the current one, as torch does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current, self.pools, self.captured_into, self.replays = "default", 0, [], 0
        replaced = {
            "Stream": lambda: SimpleNamespace(wait_stream=lambda other: None),
            "current_stream": lambda: self,
            "set_stream": self.set_stream,
            "stream": self.nothing,
            "synchronize": lambda: None,
            "graph_pool_handle": self.new_pool,
            "CUDAGraph": lambda: SimpleNamespace(replay=self.replay),
            "graph": self.capture,
            "get_device_properties": lambda device: SimpleNamespace(L2_cache_size=1 << 20),
        }
        for name, value in replaced.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def wait_stream(self, other: object) -> None:
        pass

    def set_stream(self, stream: object) -> None:
        self.current = "default" if stream is self else "another"

    @contextmanager
    def nothing(self, stream: object):
        yield

    def new_pool(self) -> int:
        self.pools += 1
        return self.pools

    @contextmanager
    def capture(self, graph: object, pool: int):
        self.captured_into.append(pool)
        self.current = "capturing"
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture") from error
        self.current = "default"

    def replay(self) -> None:
        self.replays += 1


def test_gpu_clock_recovers_from_a_failed_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    clock = CudaClock(torch.device("cpu"))

    def synchronises() -> None:
        if cuda.current == "capturing":
            raise RuntimeError("operation not permitted when stream is capturing")

    clock.begin()
    good = clock.ready(lambda: None)
    bad = clock.ready(synchronises)
    after = clock.ready(lambda: None)
    assert cuda.current == "default"
    assert good.note is None
    assert after.note is None
    assert bad.call is synchronises
    assert bad.note == "not captured as a graph: RuntimeError: operation not permitted when stream is capturing"
    first, failed, last = cuda.captured_into
    assert first == failed != last  # one pool for a race; a new one where that was left in the middle of a capture
    good.call()
    assert cuda.replays == 1
