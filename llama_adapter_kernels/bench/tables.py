"""Tables: for the terminal, and the Markdown one that README shows."""

from collections.abc import Iterable

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


COLUMNS = ("contestant", "time", "spread", "over two SDPA", "over plain", "compute (of GEMM)", "memory (of copy)",
           "peak memory")  # fmt: skip


def row(entry: Measurement, race: analysis.Race, results: Results) -> tuple[str, ...]:
    """One line of the long table, as in COLUMNS."""
    assert entry.median is not None
    assert entry.quartiles is not None
    rates = analysis.rates(entry, results.ceilings)
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


def terminal_table(results: Results) -> Table:
    """Every timed contestant of every race. Ratios above 1 are faster."""
    table = Table(title="Medians; spread is the interquartile range; ratios above 1x are faster")
    for number, column in enumerate(COLUMNS):
        table.add_column(column, justify="left" if number == 0 else "right", no_wrap=number > 0)
    for (_, mode, dtype), race in results.races().items():
        table.add_section()
        first = next(iter(race.values()))
        table.add_row(f"[bold]{first.title}, {mode}, {dtype}[/bold]")
        for entry in analysis.timed(race).values():
            table.add_row(*row(entry, race, results), style="cyan" if entry.ours else None)
    return table


def not_timed(results: Results) -> list[str]:
    """One line per contestant and reason, with the races it holds for; wrong results first."""
    found: dict[tuple[bool, str, str], list[str]] = {}
    for entry in results.measurements:
        if entry.status != "timed":
            key = (entry.status != "wrong", entry.peer, entry.reason or "")
            found.setdefault(key, []).append(" ".join(entry.race))
    races = len(results.races())
    return [
        f"{'not run' if right else 'WRONG'}: {peer} ({'every race' if len(where) == races else _some(where)}): {reason}"
        for (right, peer, reason), where in sorted(found.items())
    ]


def _some(where: list[str]) -> str:
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
