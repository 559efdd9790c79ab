"""Times calls against each other, so that drift of the machine hits all of them alike.

Every round times each contestant once, in an order shuffled by seed; the figures are medians over rounds. Contestants
many times slower than the fastest take part in every fourth round only. On a GPU every call runs on a flushed L2 cache,
as a captured graph where it can be captured, between two events of its stream.
"""

import ctypes
import gc
import math
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch

from llama_adapter_kernels.bench import machine, reasons

Call = Callable[[], object]


@dataclass(frozen=True)
class Budget:
    """Seconds of measuring per race, and how many rounds that may be.

    Where four times the seconds are gone three rounds suffice, and a call that alone takes longer is made once.
    """

    seconds: float
    least_rounds: int
    most_rounds: int


FULL = Budget(seconds=5.0, least_rounds=7, most_rounds=40)
QUICK = Budget(seconds=1.0, least_rounds=5, most_rounds=15)
_FEWEST_ROUNDS = 3
_OVERTIME = 4  # times the seconds of a race, when rounds are slow
_ROUNDS_UNDISTURBED = 6
_SLOW, _SLOW_EVERY = 10.0, 4  # times the fastest contestant; such a one takes part in every fourth round


def share(budget: Budget, seconds_left: float, races_left: int) -> Budget:
    """The budget of the next race where time is limited: half of its share, because checks take the other half."""
    return replace(budget, seconds=min(budget.seconds, max(QUICK.seconds, seconds_left / races_left / 2)))


@dataclass(frozen=True)
class Timing:
    """Seconds per call, one sample per round of `repeats` calls; note: what was different about this contestant."""

    median: float
    first_quartile: float
    third_quartile: float
    samples: tuple[float, ...]
    repeats: int
    note: str | None = None

    @property
    def rounds(self) -> int:
        return len(self.samples)

    @property
    def spread(self) -> float:
        """Interquartile range over the median."""
        return (self.third_quartile - self.first_quartile) / self.median


def summarize(samples: list[float], repeats: int, note: str | None = None) -> Timing:
    first, median, third = statistics.quantiles(samples * 2 if len(samples) == 1 else samples, n=4, method="inclusive")
    return Timing(median, first, third, tuple(samples), repeats, note)


@dataclass(frozen=True)
class Ready:
    """A call that is warm, in its fastest form; note: why it has no faster one."""

    call: Call
    note: str | None = None


class Clock(Protocol):
    """How calls are timed on one kind of device."""

    method: str

    def begin(self) -> None:
        """A race begins; nothing of the one before is in use any more."""
        ...

    def ready(self, call: Call) -> Ready:
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
    long_call = 0.5

    def __init__(self) -> None:
        self._flush = torch.empty(2 * machine.cache_bytes(), dtype=torch.uint8)

    def begin(self) -> None:
        pass

    def ready(self, call: Call) -> Ready:
        for _ in range(2):
            if _wall_time(call, 1) > self.long_call:
                break  # the check has warmed it up, and the first of so long a call is not slower than the next
        return Ready(call)

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
        self.begin()

    def begin(self) -> None:
        # One pool for the graphs of a race: they are never replayed at the same time and keep no results.
        self._pool = torch.cuda.graph_pool_handle()

    def ready(self, call: Call) -> Ready:
        stream, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(stream)
        with torch.cuda.stream(side):  # capture wants its warm-up on a side stream
            for _ in range(3):
                call()
        stream.wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool):
                call()
        except Exception as error:  # synchronises with the host or allocates outside of the pool: time it as it is
            # A capture that ends badly leaves its stream the current one and its pool marked as being captured into.
            torch.cuda.set_stream(stream)
            torch.cuda.synchronize()
            self._pool = torch.cuda.graph_pool_handle()
            return Ready(call, f"not captured as a graph: {reasons.first_line(error.__context__ or error)}")
        return Ready(graph.replay)

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


def race(
    calls: dict[str, Call], clock: CpuClock | CudaClock, budget: Budget, cold: bool = False
) -> tuple[dict[str, Timing], dict[str, str]]:
    """Times the calls interleaved; returns ({name: timing}, {name: why it could not be timed}).

    Args:
        calls: by name; each one is warmed up here.
        cold: flush the caches before every call (GPUs: always done).
    """
    clock.begin()
    ready: dict[str, Ready] = {}
    repeats: dict[str, int] = {}
    failed: dict[str, str] = {}
    cost: dict[str, float] = {}  # seconds of one round
    for name, call in calls.items():
        try:
            warm = clock.ready(call)
            once = clock.sample(warm.call, 1, cold)
        except Exception as error:  # such as out of memory beside the others; the race goes on without it
            failed[name] = reasons.first_line(error)
            continue
        ready[name], repeats[name] = warm, clock.repeats(once, cold)
        cost[name] = once * repeats[name]
    timed_already = {name for name, seconds in cost.items() if seconds > _OVERTIME * budget.seconds}
    slow = {name for name, seconds in cost.items() if seconds > _SLOW * min(cost.values())}
    started = time.perf_counter()
    samples = {name: [cost[name] / repeats[name]] if name in timed_already else [] for name in ready}
    order, shuffle = [name for name in ready if name not in timed_already], random.Random(0)
    for done in range(budget.most_rounds):
        spent = time.perf_counter() - started
        over = spent > budget.seconds and done >= budget.least_rounds
        if over or (spent > _OVERTIME * budget.seconds and done >= _FEWEST_ROUNDS):
            break
        shuffle.shuffle(order)
        for name in order:
            if name not in slow or done < _FEWEST_ROUNDS or done % _SLOW_EVERY == 0:
                samples[name].append(clock.sample(ready[name].call, repeats[name], cold))
    timings = {name: summarize(samples[name], repeats[name], warm.note) for name, warm in ready.items()}
    return timings, failed


def undisturbed(calls: dict[str, Call], clock: CpuClock | CudaClock, longest: float) -> dict[str, float]:
    """Least seconds of each call, the calls in turns: what the machine can do when nothing else wants it.

    Goes on until every least time has been reached twice, give or take 5%: on a busy machine the first rounds show the
    neighbours. At least six rounds, and none after `longest` seconds.
    """
    clock.begin()
    ready = {name: clock.ready(call) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    started = time.perf_counter()
    while time.perf_counter() - started < longest:
        for name, warm in ready.items():
            samples[name].append(clock.sample(warm.call, 1, cold=False))
        if len(samples[name]) >= _ROUNDS_UNDISTURBED and all(_reached_twice(found) for found in samples.values()):
            break
    return {name: min(found) for name, found in samples.items()}


def _reached_twice(samples: list[float]) -> bool:
    least, second = sorted(samples)[:2]
    return second <= 1.05 * least


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
