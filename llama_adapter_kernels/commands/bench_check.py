"""`llama-adapter bench-check`."""

from pathlib import Path
from typing import Annotated

import typer

from llama_adapter_kernels.commands.races import Device, chosen_device, planned, run_races
from llama_adapter_kernels.errors import UserError


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

    place = chosen_device(device)
    found = results.Results(machine.facts(place), {}, {}, "")
    name = regression.processor(found)
    plans = planned(place, None, None, None, quick=True)
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
        run_races(open_races, place, found, None, measure.QUICK, clock, None, True, None)
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
