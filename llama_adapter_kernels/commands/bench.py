"""`llama-adapter bench`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llama_adapter_kernels.commands.races import Device, chosen_device, planned, run_races
from llama_adapter_kernels.errors import UserError

if TYPE_CHECKING:
    import torch

    from llama_adapter_kernels.bench.results import Results

Cases = Annotated[list[str] | None, typer.Option("--case", help="Only this case; may be repeated.")]
Peers = Annotated[
    list[str] | None,
    typer.Option("--peer", help="Only this contestant; may be repeated. Ratios need sdpa and two-sdpa among them."),
]
Dtypes = Annotated[list[str] | None, typer.Option("--dtype", help="Only this dtype; may be repeated.")]


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
        typer.Option(
            help="Keep the figures in this .json file, or in a folder as bench-<device>.json or bench-<device>-quick.json."
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Keep what the result file has, run the rest.")] = False,
    minutes: Annotated[
        float | None, typer.Option(help="Share so many minutes among the races, start none after them.", min=0.1)
    ] = None,
    record_order: Annotated[
        bool,
        typer.Option("--record-order", help="On a GPU: let these races choose between cuda and triton from now on."),
    ] = False,
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

    place = chosen_device(device)
    if show:
        _list(place)
        return
    if record_order and place.type != "cuda":
        raise UserError("--record-order: expected --device cuda, a CPU has one backend")
    plans = planned(place, case, peer, dtype, quick)
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
    left = run_races(plans, place, found, path, budget, clock, peer, quick, minutes)
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
    if record_order:
        _record_order(found)


def _record_order(found: "Results") -> None:
    from llama_adapter_kernels.bench import order_record
    from llama_adapter_kernels.ops import cuda_tiles, order
    from llama_adapter_kernels.ops.record_file import RecordError

    try:
        entries = order_record.record(found, order.RECORD)
        tiles = order_record.record_tiles(found, cuda_tiles.RECORD)
    except (RecordError, OSError) as error:
        raise UserError(f"--record-order: {error}") from error
    for entry in entries:
        typer.echo(
            f"order recorded: {entry.capability} {entry.pass_name} {entry.dtype} head_dim {entry.head_dim}: {entry.faster} "
            f"({entry.ratio:.2f} times the other's speed, {entry.races} races)"
        )
    for tile in tiles:
        typer.echo(
            f"tiles recorded: {tile.capability} cuda forward, head_dim 65 to 128: {tile.keys} keys "
            f"({tile.ratio:.2f} times the other's speed, {tile.races} races)"
        )
    typer.echo(f"written: {order.RECORD}{f' and {cuda_tiles.RECORD}' if tiles else ''}")


def _result_path(output: Path | None, place: "torch.device", quick: bool) -> Path | None:
    if output is None or output.suffix == ".json":
        return output
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output}: expected a folder or a name that ends in .json")
    return output / f"bench-{place.type}{'-quick' if quick else ''}.json"


def _list(place: "torch.device") -> None:
    from llama_adapter_kernels.bench import cases, runner

    typer.echo(f"Cases on {place.type} (* also in --quick, - only by name):")
    for case in cases.cases(place.type).values():
        when = "-" if case.on_request else "*" if case.quick else " "
        typer.echo(f"  {case.name:<20} {when} {case.title} ({', '.join(case.dtypes)})")
    typer.echo("Contestants:")
    for name, label in runner.known_peers().items():
        typer.echo(f"  {name:<20}   {label}")
