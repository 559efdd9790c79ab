"""Runs of a comparison against the clock: what comes next follows from what is done; results are kept as they come.

Every method gets the same effort: the same three learning rates on seed 0, of which the one that does best on the
validation part is run with two more seeds. What is reported is measured on a third part, the test part.
"""

import json
import math
import multiprocessing
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from llama_adapter_kernels.bench import machine

SEEDS = (0, 1, 2)
PRECISION = "high"  # of float32 matrix products: TF32 on a GPU that has it; a CPU computes in float32
Result = dict[str, Any]  # the fields of a Run, and what was measured: "validation", "test", ... or "error"


class OutOfTime(Exception):
    """The deadline passed in the middle of a run, which counts for nothing."""


@dataclass(frozen=True)
class Run:
    """One training: which task, by which method, at which learning rate and seed; layers and length of a prompt."""

    task: str
    method: str
    rate: float
    seed: int = 0
    layers: int = 0
    length: int = 0


class Task(Protocol):
    """What is learned, on which data."""

    def plan(self, finished: Sequence[Result]) -> Iterator[tuple[int, Run]]:
        """All runs that can be told from the finished ones, each with its rank: the lowest ones are done first."""
        ...

    def carry_out(self, run: Run, deadline: float) -> Result:
        """Trains and measures; OutOfTime when `deadline` (time.time()) passes."""
        ...

    def about(self) -> dict[str, Any]:
        """What a report has to say about data and settings."""
        ...


def key(result: Result | Run) -> tuple[Any, ...]:
    """What tells runs apart."""
    values = asdict(result) if isinstance(result, Run) else result
    return tuple(values[name] for name in Run.__dataclass_fields__)


def grid(task: str, method: str, rates: Sequence[float], **options: int) -> list[Run]:
    """The runs of seed 0 among which the learning rate is chosen."""
    return [Run(task, method, rate, 0, **options) for rate in rates]


def best_rate(runs: Sequence[Run], finished: Sequence[Result]) -> float | None:
    """The rate of the run that did best on the validation part; None while one is still to come, or all failed."""
    found = {key(result): result for result in finished}
    if not all(key(run) in found for run in runs):
        return None
    good = [found[key(run)] for run in runs if "error" not in found[key(run)]]
    return min(good, key=lambda result: result["validation"])["rate"] if good else None


def check_time(deadline: float) -> None:
    if time.time() > deadline:
        raise OutOfTime


def carry_out(run: Run, task: Task, deadline: float) -> Result | None:
    """The result of one run, with "error" where it failed; None: out of time."""
    try:
        check_time(deadline)
        begin = time.perf_counter()
        measured = task.carry_out(run, deadline)
        if not math.isfinite(measured["test"]):
            return asdict(run) | {"error": "diverged"}
        return asdict(run) | measured | {"seconds": round(time.perf_counter() - begin, 2)}
    except OutOfTime:
        return None
    except Exception as error:  # the others go on
        traceback.print_exc()
        return asdict(run) | {"error": f"{type(error).__name__}: {error}".splitlines()[0][:300]}


_tasks: dict[str, Task] = {}  # of a worker process


def _start(tasks: dict[str, Task], threads: int) -> None:
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(PRECISION)
    _tasks.update(tasks)


def _work(run: Run, deadline: float) -> Result | None:
    return carry_out(run, _tasks[run.task], deadline)


@contextmanager
def workers(tasks: dict[str, Task], jobs: int) -> Iterator[Any]:
    """Something with `submit(run, deadline)`: processes, or this one where one job at a time is wanted."""
    if jobs == 1:
        yield _Here(tasks)
        return
    threads = max(1, torch.get_num_threads() // jobs)
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(jobs, context, initializer=_start, initargs=(tasks, threads))
    try:
        yield _Pool(pool)
    finally:
        pool.shutdown(cancel_futures=True)


class _Here:
    def __init__(self, tasks: dict[str, Task]) -> None:
        self.tasks = tasks

    def submit(self, run: Run, deadline: float) -> "Future[Result | None]":
        future: Future[Result | None] = Future()
        future.set_result(carry_out(run, self.tasks[run.task], deadline))
        return future


class _Pool:
    def __init__(self, pool: ProcessPoolExecutor) -> None:
        self.pool = pool

    def submit(self, run: Run, deadline: float) -> "Future[Result | None]":
        return self.pool.submit(_work, run, deadline)


def all_runs(tasks: dict[str, Task], finished: Sequence[Result]) -> list[Run]:
    """Whatever can be told to be done, the most important first."""
    ranked = [planned for task in tasks.values() for planned in task.plan(finished)]
    return [run for _, run in sorted(ranked, key=lambda planned: planned[0])]


def compare(tasks: dict[str, Task], output: Path, device: torch.device, *, jobs: int, minutes: float) -> list[Result]:
    """Carries out what the tasks plan, as far as the time goes; writes `output` after every run, and goes on with one
    that is there already."""
    deadline = time.time() + 60 * minutes
    about = {name: task.about() for name, task in tasks.items()}
    finished: list[Result] = []
    if output.exists():
        before = json.loads(output.read_text())
        if {name: _fixed(task) for name, task in before["tasks"].items()} != {n: _fixed(t) for n, t in about.items()}:
            raise SystemExit(f"{output}: expected results of the same settings to go on with; remove it to start anew")
        finished = [result for result in before["runs"] if "error" not in result]
    torch.set_float32_matmul_precision(PRECISION)
    facts = machine.facts(device) | {"jobs": jobs}
    open_runs: dict[Future[Result | None], Run] = {}
    with workers(tasks, jobs) as pool:
        while True:
            begun = {key(result) for result in finished} | {key(run) for run in open_runs.values()}
            waiting = [run for run in all_runs(tasks, finished) if key(run) not in begun]
            try:
                while waiting and len(open_runs) < jobs and time.time() < deadline:
                    run = waiting.pop(0)
                    open_runs[pool.submit(run, deadline)] = run
                if not open_runs:
                    break
                done, _ = wait(open_runs, return_when=FIRST_COMPLETED)
                for future in done:
                    run, result = open_runs.pop(future), future.result()
                    if result is not None:
                        finished.append(result)
                        print(_line(result), flush=True)
            except Exception as error:  # a worker process died: what there is, is kept
                print(f"stopped: {type(error).__name__}: {error}", flush=True)
                break
            write(output, facts, about, finished)
    write(output, facts, about, finished)
    left = [run for run in all_runs(tasks, finished) if key(run) not in {key(result) for result in finished}]
    print(f"{len(finished)} runs done, {len(left)} known ones left, {(deadline - time.time()) / 60:.1f} minutes to go")
    return finished


def _fixed(about: dict[str, Any]) -> dict[str, Any]:
    """What runs must have in common to be compared; learning rates may be added."""
    return {name: value for name, value in about.items() if name not in ("rates", "titles")}


def write(output: Path, facts: dict[str, Any], about: dict[str, Any], finished: Sequence[Result]) -> None:
    """The results, one run per line."""
    output.parent.mkdir(parents=True, exist_ok=True)
    runs = ",\n".join(
        json.dumps(result) for result in sorted(finished, key=lambda result: [str(k) for k in key(result)])
    )
    head = json.dumps({"machine": facts, "tasks": about}, indent=1).removesuffix("\n}")
    staged = output.with_suffix(".part")
    staged.write_text(f'{head},\n "runs": [\n{runs}\n]}}\n')
    staged.replace(output)


def _line(result: Result) -> str:
    name = " ".join(str(value) for value in key(result))
    if "error" in result:
        return f"{name}: {result['error']}"
    return f"{name}: test {result['test']:.4f}, {result['parameters']:,} parameters, {result['seconds']} s"
