"""Tables for the terminal, and the one in Markdown that benchmarks/README.md shows."""

from collections.abc import Iterable, Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from llama_adapter_kernels.bench import analysis
from llama_adapter_kernels.bench.results import Measurement, Results

README_BEGIN, README_END = "<!-- benchmark table -->", "<!-- /benchmark table -->"


def seconds(value: float | None) -> str:
    """Three figures, in the unit that suits: "1.23 ms"."""
    if value is None:
        return "-"
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= size or unit == "µs":
            return f"{_three(value / size)} {unit}"
    raise AssertionError


def _three(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def rate(value: float, unit: str) -> str:
    for prefix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if value >= size:
            return f"{_three(value / size)} {prefix}{unit}"
    return f"{value:.0f} {unit}"


def ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def mebibytes(value: int | None) -> str:
    return "-" if value is None else f"{value / 2**20:.1f} MiB"


def share(value: float | None) -> str:
    return "" if value is None else f" ({value:.0%})"


COLUMNS = ("contestant", "time", "spread", "over two SDPA", "over plain", "compute (of GEMM)", "memory (of copy/read)",
           "peak memory")  # fmt: skip
# What a narrower terminal leaves out, the first of them first; the result file and the report have everything.
_DISPENSABLE = ("memory (of copy/read)", "compute (of GEMM)", "peak memory", "spread")
_NARROWEST_CONTESTANT = 28  # characters; longer names are continued on the next line


def row(entry: Measurement, race: analysis.Race, ceilings: dict[str, float]) -> tuple[str, ...]:
    """One line of the long table, as in COLUMNS."""
    assert entry.median is not None
    assert entry.quartiles is not None
    rates = analysis.rates(entry, ceilings)
    low, high = entry.quartiles
    return (
        entry.label,
        seconds(entry.median),
        f"{(high - low) / entry.median:.0%}",
        ratio(analysis.speedup(analysis.two_sdpa(race), entry)),
        ratio(analysis.speedup(analysis.plain_sdpa(race), entry)),
        rate(rates.flops, "FLOP/s") + share(rates.share_of_gemm),
        rate(rates.bandwidth, "B/s") + share(rates.share_of_memory),
        mebibytes(entry.peak_memory),
    )


def terminal_table(results: Results, width: int) -> Table:
    """Every timed contestant of every race, in so many columns as `width` characters hold. Ratios above 1 are faster."""
    ceilings = analysis.trusted_ceilings(results)
    races = {race: [(entry, row(entry, entries, ceilings)) for entry in analysis.timed(entries).values()]
             for race, entries in results.races().items()}  # fmt: skip
    shown = _columns_that_fit([cells for rows in races.values() for _, cells in rows], width)
    table = Table(title=_caption(shown), title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for column in shown:
        first = column == COLUMNS[0]
        table.add_column(_heading(column), justify="left" if first else "right", no_wrap=not first)
    for (name, mode, dtype), rows in races.items():
        if not rows:
            continue
        title = next(iter(results.races()[name, mode, dtype].values())).title
        table.add_section()
        table.add_row(f"[bold]{title}, {mode}, {dtype}[/bold]")
        for entry, cells in rows:
            values = dict(zip(COLUMNS, cells, strict=True))
            table.add_row(*(values[column] for column in shown), style="cyan" if entry.ours else None)
    return table


def _columns_that_fit(rows: list[tuple[str, ...]], width: int) -> list[str]:
    widths = {
        column: max([*(len(cells[number]) for cells in rows), *(len(line) for line in _heading(column).splitlines())])
        for number, column in enumerate(COLUMNS)
    }
    widths[COLUMNS[0]] = min(widths[COLUMNS[0]], _NARROWEST_CONTESTANT)
    shown = list(COLUMNS)
    for column in _DISPENSABLE:
        if sum(widths[name] + 2 for name in shown) <= width:
            break
        shown.remove(column)
    return shown


def _heading(column: str) -> str:
    """In two lines where there is a second word."""
    return column.replace(" (", "\n(").replace("over ", "over\n").replace("peak ", "peak\n")


def _caption(shown: list[str]) -> str:
    text = "Medians; ratios above 1x are faster"
    text += "; spread: interquartile range over the median" if "spread" in shown else ""
    missing = [column for column in COLUMNS if column not in shown]
    return text + (f"\n(a wider terminal shows also: {', '.join(missing)})" if missing else "")


_REMARKS = {"wrong": "WRONG, not timed", "unavailable": "not run", "timed": "timed all the same"}


def remarks(results: Results) -> list[str]:
    """One line per reason, with the contestants and the races it holds for: wrong results first, then those that did not
    run, then those that ran in another way than the rest.
    """
    races_of: dict[tuple[int, str, str], list[str]] = {}
    for entry in results.measurements:
        if entry.reason is not None:
            key = (list(_REMARKS).index(entry.status), entry.reason, entry.peer)
            races_of.setdefault(key, []).append(" ".join(entry.race))
    peers_of: dict[tuple[int, str, tuple[str, ...]], list[str]] = {}
    for (kind, reason, peer), races in sorted(races_of.items()):
        peers_of.setdefault((kind, reason, tuple(races)), []).append(peer)
    count = len(results.races())
    busy = [
        "the machine was busy when its ceilings were measured: contestants computed faster than its matrix products, "
        "and no shares of their rate are shown"
    ]
    return (busy if analysis.trusted_ceilings(results) != results.ceilings else []) + [
        f"{list(_REMARKS.values())[kind]}: {', '.join(peers)} "
        f"({'every race' if len(races) == count else _some(races)}): {reason}"
        for (kind, reason, races), peers in peers_of.items()
    ]


def _some(where: Sequence[str]) -> str:
    return ", ".join(where) if len(where) <= 3 else f"{len(where)} races"


def readme_table(results: Results) -> str:
    """Markdown: one line per race outside of the sweeps, times in milliseconds."""
    lines = [
        "| Case | dtype | pass | plain SDPA, no adapter | two SDPA calls | eager / PEFT | fused | over two SDPA |",
        "|---|---|---|--:|--:|--:|--:|--:|",
    ]
    for (name, mode, dtype), race in results.races().items():
        first = next(iter(race.values()))
        if first.sweep is not None and name != "llama-7b":
            continue
        for packed in (False, True):
            ours = analysis.fused(race, packed)
            if ours is None or analysis.two_sdpa(race) is None:
                continue
            shown: Iterable[Measurement | None] = (
                analysis.plain_sdpa(race), analysis.two_sdpa(race), analysis.eager(race), ours,
            )  # fmt: skip
            times = " | ".join(seconds(entry.median) if entry is not None else "-" for entry in shown)
            title = first.title + (", packed" if packed else "")
            faster = ratio(analysis.speedup(analysis.two_sdpa(race), ours))
            lines.append(f"| {title} | {dtype} | {mode} | {times} | {faster} |")
    machine = results.machine
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"
    lines += ["", f"Medians on {where}, torch {machine['torch']}, commit {machine['commit']}, {results.recorded}."]
    return "\n".join(lines)


def insert_in_readme(text: str, table: str, files: list[str]) -> str:
    """README's text with the block between the markers replaced; the block names its files.

    Raises:
        ValueError: the markers are not there, once each and in order.
    """
    if (
        text.count(README_BEGIN) != 1
        or text.count(README_END) != 1
        or text.index(README_BEGIN) > text.index(README_END)
    ):
        raise ValueError(f"README: expected one {README_BEGIN} and one {README_END} after it")
    before, _, rest = text.partition(README_BEGIN)
    after = rest.partition(README_END)[2]
    return f"{before}{README_BEGIN}\n{block(table, files)}\n{README_END}{after}"


def block(table: str, files: list[str]) -> str:
    links = ", ".join(f"[{name.rpartition('/')[2]}]({name})" for name in files)
    return f"{table}\n\nRecorded in {links}."


def recorded_files(text: str) -> list[str]:
    """The files that the block in README's text names."""
    between = text.partition(README_BEGIN)[2].partition(README_END)[0]
    last = between.rpartition("Recorded in ")[2]
    return [part.partition(")")[0] for part in last.split("](")[1:]]
