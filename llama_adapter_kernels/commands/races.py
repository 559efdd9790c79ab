"""What `bench` and `bench-check` share: where to run, which races, and running them with a progress bar."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llama_adapter_kernels.errors import UserError

if TYPE_CHECKING:
    import torch

    from llama_adapter_kernels.bench.measure import Budget, CpuClock, CudaClock
    from llama_adapter_kernels.bench.results import Results
    from llama_adapter_kernels.bench.runner import Plan

Device = Annotated[str, typer.Option(help="cpu, cuda, or auto: cuda where there is one.")]


def chosen_device(name: str) -> "torch.device":
    import torch

    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device: expected auto, cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this torch sees no CUDA device")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")


def planned(
    place: "torch.device", case: list[str] | None, peer: list[str] | None, dtype: list[str] | None, quick: bool
) -> "list[Plan]":
    from llama_adapter_kernels.bench import cases, runner

    try:
        cases.check_names("dtype", dtype, cases.DTYPES)
        cases.check_names("peer", peer, runner.known_peers())
        chosen = cases.select(place.type, case, quick)
    except ValueError as error:
        raise UserError(str(error)) from error
    plans = runner.plan(chosen, dtype)
    if not plans:
        offered = "; ".join(f"{item.name}: {', '.join(item.dtypes)}" for item in chosen)
        raise UserError(f"dtype: no case has {', '.join(dtype or ())} on {place.type} ({offered})")
    if not peer:
        return plans
    with_one = [item for item in plans if any(contestant.name in peer for contestant in runner.peers_of(item.case))]
    if not with_one:
        names = dict.fromkeys(contestant.name for item in plans for contestant in runner.peers_of(item.case))
        where = ", ".join(dict.fromkeys(item.case.name for item in plans))
        raise UserError(f"peer: expected for {where} one of {', '.join(names)}; got {', '.join(peer)}")
    return with_one


def run_races(plans: "list[Plan]", place: "torch.device", found: "Results", path: Path | None, budget: "Budget",
         clock: "CpuClock | CudaClock",
         peers: list[str] | None, quick: bool, minutes: float | None) -> "list[Plan]":  # fmt: skip
    """Runs the races with a progress bar; the file is written after each one. Returns those that time did not allow."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from llama_adapter_kernels.bench import measure, runner

    end = time.monotonic() + 60 * minutes if minutes is not None else float("inf")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(plans))
        for number, item in enumerate(plans):
            seconds_left = end - time.monotonic()
            if seconds_left <= 0:
                return plans[number:]
            share = measure.share(budget, seconds_left, len(plans) - number)
            progress.update(task, description=item.name)
            for entries in runner.run([item], place, share, clock, peers, quick):
                found.measurements += entries
            if path is not None:
                found.save(path)
            progress.advance(task)
    return []
