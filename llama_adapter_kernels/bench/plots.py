"""The report's plots, as matplotlib figures."""

from typing import Any

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from llama_adapter_kernels.bench import analysis, tables
from llama_adapter_kernels.bench.cases import DTYPES
from llama_adapter_kernels.bench.results import Measurement, Results

FUSED, TWO, EAGER, PLAIN, OTHER = "#0b6e4f", "#d1812c", "#8c6bb1", "#5b6770", "#b0b7bd"
_FONT: dict[Any, Any] = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "lak"}
_LABELS = {
    "forward": "Forward",
    "forward+backward": "Forward + backward",
    "step": "Training step",
    "token": "One token",
}
_MODES = {"forward": "o", "forward+backward": "D", "step": "P", "token": "*"}
_DTYPES = {"float32": "#2f6fab", "bfloat16": FUSED, "float16": EAGER}
_MARKERS = {"attention": "o", "varlen": "s", "decode": "^", "module": "D", "training": "P", "generation": "*"}


def all_plots(results: Results) -> dict[str, Figure]:
    """{file name without ending: figure}, without those that the results have nothing for."""
    import matplotlib

    makers = {
        "overview": overview,
        "speedup": speedup,
        "length": time_by_length,
        "roofline": roofline,
        "memory": memory,
    }
    with matplotlib.rc_context(_FONT):
        figures = {name: make(results) for name, make in makers.items()}
    return {name: figure for name, figure in figures.items() if figure is not None}


def _kind(entry: Measurement) -> tuple[str, str]:
    """(colour, label) of a contestant."""
    if analysis.is_fused(entry):
        return FUSED, "fused"
    if entry.peer.startswith("two-"):
        return TWO, "two SDPA calls"
    if entry.peer in ("eager", "eager-512", "peft"):
        return EAGER, "eager / PEFT"
    if entry.peer in ("sdpa", "sdpa-loop", "sdpa-rows"):
        return PLAIN, "plain SDPA, no adapter"
    return OTHER, entry.label


def _rows(results: Results) -> list[tuple[str, str, analysis.Race]]:
    """(label, mode, race) of the races outside of the sweeps."""
    found = []
    for (name, mode, dtype), race in results.races().items():
        first = next(iter(race.values()))
        if first.sweep is None or name == "llama-7b":
            found.append((f"{first.title}, {dtype}", mode, race))
    return found


def _bars(axes: Axes, labels: list[str], series: dict[str, tuple[str, list[float | None]]], text: Any) -> None:
    """Horizontal bars, one group per label from top to bottom, one bar per series, each with its value."""
    height = 0.8 / len(series)
    for number, (name, (colour, values)) in enumerate(series.items()):
        places = [index + (number - (len(series) - 1) / 2) * height for index in range(len(labels))]
        axes.barh(places, [value or 0 for value in values], height * 0.92, color=colour, label=name)
        for place, value in zip(places, values, strict=True):
            if value is not None:
                axes.annotate(
                    text(value),
                    (value, place),
                    (3, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=8,
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
                )
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)


def _panels(rows: list[tuple[str, str, analysis.Race]], bars: int) -> tuple[Figure, list[tuple[str, Axes]]]:
    """One panel per mode, one below the other, as high as it has rows."""
    modes = [mode for mode in _LABELS if any(row[1] == mode for row in rows)]
    counts = [sum(row[1] == mode for row in rows) for mode in modes]
    figure = Figure(figsize=(10, 0.16 * (bars + 0.8) * sum(counts) + 0.9 * len(modes) + 0.4), layout="constrained")
    axes = figure.subplots(len(modes), 1, height_ratios=[count + 0.5 for count in counts], squeeze=False)[:, 0]
    return figure, list(zip(modes, axes, strict=True))


def _legend_on_top(figure: Figure, axes: Axes, columns: int) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=columns, frameon=False, fontsize=9)


def overview(results: Results) -> Figure | None:
    """One line per case: how many times faster than two SDPA calls, by pass and dtype."""
    ratios: dict[str, dict[tuple[str, str], float]] = {}
    for label, mode, race in _rows(results):
        ratio = analysis.speedup(analysis.two_sdpa(race), analysis.fused(race))
        if ratio is not None:
            first = next(iter(race.values()))
            ratios.setdefault(label.removesuffix(f", {first.dtype}"), {})[mode, first.dtype] = ratio
    if not ratios:
        return None
    figure = Figure(figsize=(9, 0.29 * len(ratios) + 1.3), layout="constrained")
    axes = figure.subplots()
    axes.axvline(1, color=TWO, linewidth=1.5)
    for line, found in enumerate(ratios.values()):
        axes.plot(
            [min(1.0, *found.values()), max(1.0, *found.values())], [line, line], color=OTHER, linewidth=1, zorder=1
        )
        for (mode, dtype), ratio in found.items():
            axes.scatter(ratio, line, 44, _DTYPES[dtype], marker=_MODES[mode], linewidths=0, zorder=2)
    axes.set_xscale("log")
    values = [ratio for found in ratios.values() for ratio in found.values()]
    _plain_log_ticks(axes.xaxis, min(values), max(values), "x")
    axes.set_xlim(min(1.0, *values) / 1.1, max(1.0, *values) * 1.1)
    axes.set_yticks(range(len(ratios)), list(ratios))
    axes.set_ylim(len(ratios) - 0.5, -0.5)
    axes.grid(axis="x", which="both", alpha=0.25)
    axes.set_axisbelow(True)
    axes.set_xlabel("times faster than two SDPA calls and a multiply-add (line: as fast)")
    keys = list(dict.fromkeys(key for found in ratios.values() for key in found))
    handles = [
        Line2D([], [], color=_DTYPES[dtype], marker=_MODES[mode], linestyle="", label=f"{_LABELS[mode]}, {dtype}")
        for mode, dtype in keys
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=-(-len(keys) // 2), frameon=False, fontsize=9)
    return figure


def speedup(results: Results) -> Figure | None:
    """How many times faster than two SDPA calls, by shape."""
    rows = [row for row in _rows(results) if analysis.two_sdpa(row[2]) and analysis.fused(row[2])]
    if not rows:
        return None
    figure, panels = _panels(rows, 3)
    contestants = {"fused": (FUSED, analysis.fused), "eager / PEFT": (EAGER, analysis.eager),
                   "plain SDPA, no adapter": (PLAIN, analysis.plain_sdpa)}  # fmt: skip
    for mode, axes in panels:
        chosen = [row for row in rows if row[1] == mode]
        series = {
            name: (colour, [analysis.speedup(analysis.two_sdpa(race), pick(race)) for _, _, race in chosen])
            for name, (colour, pick) in contestants.items()
        }
        _bars(axes, [label for label, _, _ in chosen], series, lambda value: f"{value:.2f}x")
        axes.axvline(1, color=TWO, linewidth=1.5, zorder=0, label="two SDPA calls = 1")
        axes.margins(x=0.08)
        axes.set_title(_LABELS[mode], loc="left", fontweight="bold")
        axes.set_xlabel("speed-up over two SDPA calls (times, more is better)")
    _legend_on_top(figure, panels[0][1], 4)
    return figure


def time_by_length(results: Results) -> Figure | None:
    """Time over sequence length, both axes logarithmic; one panel per mode."""
    sweeps = [entry for entry in results.measurements if entry.sweep is not None and entry.median is not None]
    lengths = {(entry.mode, entry.dtype): set[int]() for entry in sweeps}
    for entry in sweeps:
        lengths[entry.mode, entry.dtype].add(entry.shape["sequence"])
    panels = [key for key, values in lengths.items() if len(values) >= 3]
    if not panels:
        return None
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    for axes, (mode, dtype) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        chosen = [entry for entry in sweeps if (entry.mode, entry.dtype) == (mode, dtype)]
        drawn: dict[str, list[Measurement]] = {}
        for entry in chosen:
            drawn.setdefault(entry.peer, []).append(entry)
        for entries in drawn.values():
            entries.sort(key=lambda entry: entry.shape["sequence"])
            if len(entries) < 3:
                continue
            colour, _ = _kind(entries[0])
            times = [1e3 * (entry.median or 0) / entry.shape["batch"] for entry in entries]
            axes.plot([entry.shape["sequence"] for entry in entries], times, color=colour, label=entries[0].label,
                      marker="o", markersize=4, linestyle="--" if not entries[0].prefix_length else "-")  # fmt: skip
        ticks = sorted(lengths[mode, dtype])
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.set_xlabel("sequence length (tokens)")
        axes.set_ylabel("time per sequence (ms)")
        axes.set_title(f"{chosen[0].sweep}, {_LABELS[mode].lower()}, {dtype}", loc="left", fontweight="bold")
        axes.grid(which="both", alpha=0.25)
        axes.legend(frameon=False, fontsize=8)
    return figure


def roofline(results: Results) -> Figure | None:
    """Work per second over work per byte, under the ceilings measured in the same run."""
    ceilings = analysis.trusted_ceilings(results)
    memory_ceiling = analysis.memory_ceiling(ceilings)
    points = [
        entry for _, _, race in _rows(results) for entry in (analysis.fused(race), analysis.two_sdpa(race)) if entry
    ]
    if not points or memory_ceiling is None:
        return None
    dtypes = [dtype for dtype in DTYPES if any(entry.dtype == dtype for entry in points)]
    fastest = max(analysis.rates(entry, ceilings).flops for entry in points)
    unit, unit_name = (1e12, "TFLOP/s") if fastest > 1e13 else (1e9, "GFLOP/s")
    figure = Figure(figsize=(10, 4.8), layout="constrained")
    columns = figure.subplots(1, len(dtypes), squeeze=False, sharey=True)[0]
    for axes, dtype in zip(columns, dtypes, strict=True):
        chosen = [entry for entry in points if entry.dtype == dtype]
        gemm = analysis.compute_ceiling(ceilings, dtype)
        intensities = [entry.flop / entry.bytes for entry in chosen]
        corner = gemm / memory_ceiling if gemm else max(intensities)
        low, high = min(*intensities, corner) / 4, max(*intensities, corner) * 2
        roof = [(low, low * memory_ceiling / unit), (corner, corner * memory_ceiling / unit)]
        roof += [(high, gemm / unit)] if gemm else []
        axes.plot(*zip(*roof, strict=True), color="black", linewidth=1)
        for entry, intensity in zip(chosen, intensities, strict=True):
            axes.scatter(intensity, analysis.rates(entry, ceilings).flops / unit, 34, _kind(entry)[0], alpha=0.85,
                         marker=_MARKERS[entry.question], linewidths=0)  # fmt: skip
        axes.set_xscale("log")
        axes.set_yscale("log")
        _plain_log_ticks(axes.xaxis, low, high)
        _plain_log_ticks(axes.yaxis, low * memory_ceiling, gemm or fastest)
        axes.set_xlabel("work per memory traffic (FLOP / byte)")
        axes.set_title(dtype, loc="left", fontweight="bold")
        # The roof's two numbers stand above the axes, where no point can be.
        product = f"matrix product {tables.rate(gemm, 'FLOP/s')}, " if gemm else ""
        axes.set_title(f"{product}memory {tables.rate(memory_ceiling, 'B/s')}", loc="right", fontsize=8)
        axes.grid(which="both", alpha=0.2)
    columns[0].set_ylabel(f"work per second ({unit_name})")
    _roofline_legend(figure, points)
    return figure


def _roofline_legend(figure: Figure, points: list[Measurement]) -> None:
    """Colours say who, shapes say what."""
    who = {_kind(entry)[1]: _kind(entry)[0] for entry in points}
    what = list(dict.fromkeys(entry.question for entry in points))
    handles = [Line2D([], [], color=colour, marker="s", linestyle="", label=name) for name, colour in who.items()]
    handles += [Line2D([], [], color=OTHER, marker=_MARKERS[name], linestyle="", label=name) for name in what]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=8)


def _plain_log_ticks(axis: Axis, low: float, high: float, unit: str = "") -> None:
    """Numbers as one reads them (0.1, 500, 20k), on logarithmic axes of less than one decade as well as of five: there is
    never one tick alone, and they never overlap.
    """
    axis.set_major_locator(LogLocator(subs=(1,) if high > 1000 * low else (1, 2, 5)))

    def text(value: float, position: int | None) -> str:
        return (f"{value:g}" if value < 1e4 else f"{value / 1e3:g}k") + unit

    axis.set_major_formatter(FuncFormatter(text))
    axis.set_minor_formatter(NullFormatter())


def _mebibytes(value: float) -> str:
    return f"{value:,.0f} MiB" if value >= 100 else f"{value:.3g} MiB"


def memory(results: Results) -> Figure | None:
    """Peak memory of one call on top of its inputs."""
    contestants = {"fused": (FUSED, analysis.fused), "two SDPA calls": (TWO, analysis.two_sdpa),
                   "eager / PEFT": (EAGER, analysis.eager)}  # fmt: skip

    def shown(race: analysis.Race) -> bool:
        picked = (pick(race) for _, pick in contestants.values())
        return any(entry is not None and entry.peak_memory is not None for entry in picked)

    rows = [row for row in _rows(results) if shown(row[2])]
    if not rows:
        return None
    figure, panels = _panels(rows, 3)
    for mode, axes in panels:
        chosen = [row for row in rows if row[1] == mode]
        series: dict[str, tuple[str, list[float | None]]] = {}
        for name, (colour, pick) in contestants.items():
            found = [pick(race) for _, _, race in chosen]
            peaks = [entry.peak_memory if entry is not None else None for entry in found]
            series[name] = (colour, [None if peak is None else max(peak / 2**20, 0.01) for peak in peaks])
        _bars(axes, [label for label, _, _ in chosen], series, _mebibytes)
        axes.set_xscale("log")
        peaks_shown = [peak for _, peaks in series.values() for peak in peaks if peak is not None]
        axes.set_xlim(left=min(peaks_shown) / 3)
        _plain_log_ticks(axes.xaxis, min(peaks_shown), max(peaks_shown))
        axes.margins(x=0.1)
        axes.set_title(_LABELS[mode], loc="left", fontweight="bold")
        axes.set_xlabel("peak memory on top of the inputs (MiB, less is better)")
    _legend_on_top(figure, panels[0][1], 3)
    return figure
