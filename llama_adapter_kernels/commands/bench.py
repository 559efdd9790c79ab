"""The commands `bench`, `bench-report` and `bench-check`."""

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

Cases = Annotated[list[str] | None, typer.Option("--case", help="Only this case; may be repeated.")]
Peers = Annotated[
    list[str] | None,
    typer.Option("--peer", help="Only this contestant; may be repeated. Ratios need sdpa and two-sdpa among them."),
]
Dtypes = Annotated[list[str] | None, typer.Option("--dtype", help="Only this dtype; may be repeated.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, or auto: cuda where there is one.")]


def bench(
    case: Cases = None,
    peer: Peers = None,
    dtype: Dtypes = None,
    device: Device = "auto",
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Fewer cases, contestants and rounds: minutes instead of a quarter of an hour."),
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(help="Keep the figures in this .json file, or in a folder as bench-<device>[-quick].json."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Keep what the result file has, run the rest.")] = False,
    minutes: Annotated[
        float | None, typer.Option(help="Share so many minutes among the races, start none after them.", min=0.1)
    ] = None,
    show: Annotated[bool, typer.Option("--list", help="List cases and contestants, run nothing.")] = False,
) -> None:
    """Time attention with an adapter against what one would write without this package.

    Every contestant is checked against the float64 reference before it is timed.
    Ratios are over two SDPA calls and over plain SDPA; contestants that cannot run are listed with the reason.
    --list shows the names of cases and contestants; `llama-adapter bench-report` makes a page of what --output keeps.
    """
    from rich.console import Console

    from llama_adapter_kernels.bench import results, runner, tables
    from llama_adapter_kernels.bench.measure import FULL, QUICK, clock_for

    place = _device(device)
    if show:
        _list(place)
        return
    plans = _plans(place, case, peer, dtype, quick)
    path = _result_path(output, place, quick)
    if path is not None and path.exists() and not resume:
        raise UserError(f"--output {path}: exists; --resume goes on with it, another name keeps it")
    budget, clock = (QUICK if quick else FULL), clock_for(place)
    found = runner.start(place, budget, plans, clock)
    if path is not None and path.exists():
        try:
            earlier = results.load(path)
            results.merge([earlier, found], [str(path), "this run"])
        except results.ResultError as error:
            raise UserError(str(error)) from error
        done = set(earlier.races())
        plans = [item for item in plans if (item.case.name, item.mode, item.dtype) not in done]
        found = earlier
    left = _run(plans, place, found, path, budget, clock, peer, quick, minutes)
    runner.finish(found, place, clock)
    if path is not None:
        found.save(path)
    console = Console(width=None if Console().is_terminal else 150)
    if any(entry.median is not None for entry in found.measurements):
        console.print(tables.terminal_table(found, console.width))
    for line in tables.remarks(found):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if left:
        further = f"`--resume --output {path}` runs them" if path is not None else "no --minutes runs all"
        typer.echo(f"time was over before {len(left)} races ({', '.join(item.name for item in left)}): {further}")
    if path is not None:
        typer.echo(f"written: {path}")
    if any(entry.status == "wrong" for entry in found.measurements):
        raise typer.Exit(1)


def bench_report(
    files: Annotated[list[Path], typer.Argument(help="Result files of `llama-adapter bench`, of one machine.")],
    output: Annotated[Path, typer.Option(help="Folder for report.html and the plots.")] = Path("bench-report"),
    readme: Annotated[Path | None, typer.Option(help="Put the table between the markers of this file.")] = None,
) -> None:
    """Write an HTML page with plots, and the Markdown table."""
    from llama_adapter_kernels.bench import report, results, tables

    try:
        merged = results.merge([results.load(path) for path in files], [str(path) for path in files])
    except results.ResultError as error:
        raise UserError(str(error)) from error
    if not any(entry.median is not None for entry in merged.measurements):
        raise UserError("no contestant of these files was timed, there is nothing to report")
    for path in report.write(merged, output):
        typer.echo(f"written: {path}")
    if readme is not None:
        try:
            names = [path.resolve().relative_to(readme.resolve().parent).as_posix() for path in files]
            text = tables.insert_in_readme(readme.read_text(), tables.readme_table(merged), names)
        except (OSError, ValueError) as error:
            raise UserError(str(error)) from error
        readme.write_text(text)
        typer.echo(f"written: {readme}")


def bench_check(
    bars: Annotated[Path, typer.Option(help="Recorded speed-ups.")] = Path("benchmarks/bars.json"),
    device: Device = "auto",
    record: Annotated[bool, typer.Option("--record", help="Write the bars of this machine instead.")] = False,
    attempts: Annotated[int, typer.Option(min=1, help="Runs of a race below its bar; the best counts.")] = 3,
) -> None:
    """Fail when a speed-up over two SDPA calls fell more than 15% below its recorded bar.

    Bars belong to a processor, its number of threads and its instruction set.
    Where there are none: --record, on a quiet machine, with kernels that are known to be good.
    """
    from llama_adapter_kernels.bench import analysis, machine, measure, regression, results, tables

    place = _device(device)
    found = results.Results(machine.facts(place), {}, {}, "")
    name = regression.processor(found)
    plans = _plans(place, None, None, None, quick=True)
    try:
        wanted = {item.name: 0.0 for item in plans} if record else regression.load_bars(bars, name)
    except results.ResultError as error:
        raise UserError(str(error)) from error
    for item in plans:
        if item.name not in wanted:
            typer.echo(f"no bar for {item.name}: not checked")
    open_races = [item for item in plans if item.name in wanted]
    clock = measure.clock_for(place)
    runs: dict[str, list[float]] = {}
    for _ in range(attempts):
        if not open_races:
            break
        found.measurements.clear()
        _run(open_races, place, found, None, measure.QUICK, clock, None, True, None)
        for race, ratio in analysis.speedups(found).items():
            runs.setdefault(race, []).append(ratio)
        if not record:
            lost = {verdict.race for verdict in regression.judge(wanted, runs) if not verdict.ok}
            open_races = [item for item in open_races if item.name in lost]
    verdicts = regression.judge(wanted, runs)
    if record:
        regression.record_bars(bars, name, runs)
        typer.echo(f"written: {bars} ({len(runs)} races on {name})")
        for verdict in verdicts:
            if verdict.ratio is None:
                typer.echo(f"no bar for {verdict.race}: not timed")
        failed = any(entry.status == "wrong" for entry in found.measurements)
    else:
        for verdict in verdicts:
            typer.echo(f"{'ok  ' if verdict.ok else 'LOSS'} {verdict}")
        failed = not all(verdict.ok for verdict in verdicts)
    if any(verdict.ratio is None for verdict in verdicts):
        for line in tables.remarks(found):
            typer.echo(line)
    if failed:
        raise typer.Exit(1)


def _device(name: str) -> "torch.device":
    import torch

    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device: expected auto, cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this torch sees no CUDA device")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")


def _plans(
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


def _result_path(output: Path | None, place: "torch.device", quick: bool) -> Path | None:
    if output is None or output.suffix == ".json":
        return output
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output}: expected a folder or a name that ends in .json")
    return output / f"bench-{place.type}{'-quick' if quick else ''}.json"


def _run(plans: "list[Plan]", place: "torch.device", found: "Results", path: Path | None, budget: "Budget",
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


def _list(place: "torch.device") -> None:
    from llama_adapter_kernels.bench import cases, runner

    typer.echo(f"Cases on {place.type} (* also in --quick, - only by name):")
    for case in cases.cases(place.type).values():
        when = "-" if case.on_request else "*" if case.quick else " "
        typer.echo(f"  {case.name:<20} {when} {case.title} ({', '.join(case.dtypes)})")
    typer.echo("Contestants:")
    for name, label in runner.known_peers().items():
        typer.echo(f"  {name:<20}   {label}")
