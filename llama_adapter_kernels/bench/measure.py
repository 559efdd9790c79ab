"""Times calls against each other, so that drift of the machine hits all of them alike.

Every round times each contestant once, in an order shuffled by seed; the figures are medians over rounds. On a GPU
every call runs on a flushed L2 cache, as a captured graph where it can be captured, between two events of its stream.
"""

import ctypes
import gc
import math
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from llama_adapter_kernels.bench import machine

Call = Callable[[], object]


@dataclass(frozen=True)
class Budget:
    """Seconds of measuring per race, and how many rounds that may be; three rounds suffice where four times the
    seconds are gone."""

    seconds: float
    least_rounds: int
    most_rounds: int


FULL = Budget(seconds=5.0, least_rounds=7, most_rounds=40)
QUICK = Budget(seconds=1.0, least_rounds=5, most_rounds=15)


@dataclass(frozen=True)
class Timing:
    """Seconds per call over `rounds` rounds of `repeats` calls each."""

    median: float
    first_quartile: float
    third_quartile: float
    least: float
    rounds: int
    repeats: int

    @property
    def spread(self) -> float:
        """Interquartile range over the median."""
        return (self.third_quartile - self.first_quartile) / self.median


def summarize(samples: list[float], repeats: int) -> Timing:
    first, median, third = statistics.quantiles(samples, n=4, method="inclusive")
    return Timing(median, first, third, min(samples), len(samples), repeats)


class Clock(Protocol):
    """How calls are timed on one kind of device."""

    method: str

    def ready(self, call: Call) -> Call:
        """Warms up; may return a faster form of the same call."""
        ...

    def sample(self, call: Call, repeats: int, cold: bool) -> float:
        """Seconds of one call, averaged over `repeats`; cold: caches are flushed before."""
        ...

    def peak_memory(self, call: Call) -> int | None:
        """Bytes that one call needs at its peak on top of what is allocated; None where that cannot be told."""
        ...


class CpuClock:
    """Wall clock. Cold calls come one at a time, after writing twice the last-level cache."""

    method = "wall clock; decode cases with flushed caches"
    shortest_sample = 2e-3

    def __init__(self) -> None:
        self._flush = torch.empty(2 * machine.cache_bytes(), dtype=torch.uint8)

    def ready(self, call: Call) -> Call:
        for _ in range(2):
            call()
        return call

    def sample(self, call: Call, repeats: int, cold: bool) -> float:
        if cold:
            total = 0.0
            for _ in range(repeats):
                self._flush.fill_(1)
                total += _wall_time(call, 1)
            return total / repeats
        return _wall_time(call, repeats)

    def repeats(self, seconds: float, cold: bool) -> int:
        return 1 if cold else max(1, math.ceil(self.shortest_sample / seconds))

    def peak_memory(self, call: Call) -> int | None:
        """Growth of the process's resident memory: counts scratch memory of every library, torch's or not (Linux)."""
        reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
        if not sys.platform.startswith("linux") or not reset.exists():
            return None
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # freed memory that the allocator kept would hide what the call takes
        try:
            reset.write_text("5")  # the high-water mark starts anew
        except OSError:  # not allowed in some containers
            return None
        before = _status_bytes(status, "VmRSS")
        call()
        return max(0, _status_bytes(status, "VmHWM") - before)


class CudaClock:
    """Events around each call, on a flushed L2 cache, replaying a graph where the call can be captured."""

    method = "CUDA events, L2 flushed before every call, graph replay where capturable"

    def __init__(self, device: torch.device) -> None:
        size = torch.cuda.get_device_properties(device).L2_cache_size
        self._flush = torch.empty(2 * max(size, 64 << 20), dtype=torch.uint8, device=device)

    def ready(self, call: Call) -> Call:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # capture wants its warm-up on a side stream
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                call()
        except RuntimeError:  # synchronises with the host or allocates outside of the graph's pool: time it as it is
            torch.cuda.synchronize()
            return call
        replay: Call = graph.replay
        return replay

    def sample(self, call: Call, repeats: int, cold: bool) -> float:
        events = []
        for _ in range(repeats):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self._flush.zero_()
            start.record()
            call()
            end.record()
            events.append((start, end))
        torch.cuda.synchronize()
        milliseconds: float = sum(start.elapsed_time(end) for start, end in events)
        return milliseconds / 1e3 / repeats

    def repeats(self, seconds: float, cold: bool) -> int:
        return 5  # the host runs ahead of the device, which hides its launch time behind the flush

    def peak_memory(self, call: Call) -> int | None:
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        peak: int = torch.cuda.max_memory_allocated() - before
        return peak


def clock_for(device: torch.device) -> CpuClock | CudaClock:
    return CudaClock(device) if device.type == "cuda" else CpuClock()


def race(calls: dict[str, Call], clock: CpuClock | CudaClock, budget: Budget, cold: bool = False) -> dict[str, Timing]:
    """Times the calls interleaved.

    Args:
        calls: by name; each one is warmed up here.
        cold: flush the caches before every call (GPUs: always done).
    """
    ready = {name: clock.ready(call) for name, call in calls.items()}
    once = {name: clock.sample(call, 1, cold) for name, call in ready.items()}
    repeats = {name: clock.repeats(seconds, cold) for name, seconds in once.items()}
    started = time.perf_counter()
    samples: dict[str, list[float]] = {name: [] for name in ready}
    order, shuffle = list(ready), random.Random(0)
    for done in range(budget.most_rounds):
        spent = time.perf_counter() - started
        if (done >= budget.least_rounds and spent > budget.seconds) or (done >= 3 and spent > 4 * budget.seconds):
            break
        shuffle.shuffle(order)
        for name in order:
            samples[name].append(clock.sample(ready[name], repeats[name], cold))
    return {name: summarize(samples[name], repeats[name]) for name in ready}


def _wall_time(call: Call, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def _status_bytes(status: Path, field: str) -> int:
    for line in status.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"{status}: no field {field}")
