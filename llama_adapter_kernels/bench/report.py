"""The HTML page: one file, nothing loaded from anywhere."""

import io
from pathlib import Path

from llama_adapter_kernels.bench import analysis, tables
from llama_adapter_kernels.bench.results import Results

CAPTIONS = {
    "overview": ("Overview", "The fused operation over two SDPA calls. Where a case is also run packed, unpacked."),
    "speedup": (
        "Speed-up by shape",
        "Times faster than the fastest composition of two SDPA calls and a multiply-add, the best one writes by hand. "
        "Plain SDPA computes no adapter at all: what lies beyond its bar is faster than attention without one.",
    ),
    "length": ("Time by sequence length", "Dashed: without the adapter. Per sequence; both axes logarithmic."),
    "roofline": (
        "Roofline",
        "Work that the problem asks for (causal and padded keys that nobody sees are none) per second, over that work "
        "per byte that must be read or written. The lines are a large matrix product and the faster of copying and "
        "reading memory, measured in the same run. A point above the slope had its data in the caches.",
    ),
    "memory": ("Peak memory", "What one call takes on top of its inputs, its results included."),
}


def write(results: Results, folder: Path) -> list[Path]:
    """Writes report.html, table.md and every plot as PNG and SVG; returns the files.

    Raises:
        UserError: matplotlib or jinja2 is not installed.
    """
    from llama_adapter_kernels.errors import UserError

    try:
        from llama_adapter_kernels.bench import plots
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed: pip install 'llama-adapter-kernels[bench]'") from error
    folder.mkdir(parents=True, exist_ok=True)
    written, figures = [], {}
    for name, figure in plots.all_plots(results).items():
        figure.savefig(folder / f"{name}.png", dpi=150)
        svg = io.StringIO()
        figure.savefig(svg, format="svg", metadata={"Date": None})
        (folder / f"{name}.svg").write_text(svg.getvalue(), encoding="utf-8")
        written += [folder / f"{name}.png", folder / f"{name}.svg"]
        figures[name] = _inline(svg.getvalue(), name)
    for name, text in (("report.html", page(results, figures)), ("table.md", tables.readme_table(results) + "\n")):
        path = folder / name
        path.write_text(text, encoding="utf-8")
        written.insert(0, path)
    return written


def write_picture(results: Results, path: Path) -> Path:
    """The overview alone, as SVG that says which run it shows."""
    from llama_adapter_kernels.bench import plots

    figure = plots.all_plots(results)["overview"]
    figure.savefig(path, metadata={"Date": None, "Title": picture_title(results)})
    return path


def picture_title(results: Results) -> str:
    return f"Speed over two SDPA calls, commit {results.machine['commit']}, {results.recorded}"


def page(results: Results, figures: dict[str, str]) -> str:
    """The page with the given inline SVG plots."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    trusted = analysis.trusted_ceilings(results)
    races = [
        {
            "title": next(iter(race.values())).title,
            "mode": mode,
            "dtype": dtype,
            "rows": [(entry.ours, tables.row(entry, race, trusted)) for entry in analysis.timed(race).values()],
        }
        for (_, mode, dtype), race in results.races().items()
    ]
    ceilings = [
        (name.replace("gemm_", "matrix product, "), tables.rate(value, "FLOP/s" if "gemm" in name else "B/s"))
        for name, value in trusted.items()
    ]
    template = environment.get_template("report.html.jinja")
    return template.render(
        columns=tables.COLUMNS, races=races, ceilings=ceilings, machine=_machine(results), method=results.method,
        recorded=results.recorded, remarks=tables.remarks(results), summary=_summary(results),
        figures=[(*CAPTIONS[name], svg) for name, svg in figures.items()],
    )  # fmt: skip


def _summary(results: Results) -> str:
    ratios = sorted(analysis.speedups(results).values())
    if not ratios:
        return "No race has both the fused operation and two SDPA calls."
    middle = (
        ratios[len(ratios) // 2] if len(ratios) % 2 else (ratios[len(ratios) // 2 - 1] + ratios[len(ratios) // 2]) / 2
    )
    return (
        f"The fused operation against two SDPA calls, {len(ratios)} races: {ratios[0]:.2f}x to {ratios[-1]:.2f}x, "
        f"median {middle:.2f}x; faster in {sum(ratio > 1 for ratio in ratios)}."
    )


def _machine(results: Results) -> list[tuple[str, str]]:
    names = {"cpu_cores": "CPU cores", "cpu": "CPU", "gpu": "GPU", "llama_adapter_kernels": "llama-adapter-kernels"}
    return [
        (names.get(name, name.replace("_", " ")), str(value))
        for name, value in results.machine.items()
        if value is not None
    ]


def _inline(svg: str, name: str) -> str:
    """Without the XML prologue; ids made unique, because several plots share a page."""
    body = svg[svg.index("<svg") :]
    for attribute, end in (('id="', '"'), ('xlink:href="#', '"'), ("url(#", ")")):
        parts = body.split(attribute)
        body = parts[0] + "".join(f"{attribute}{name}-{part}" for part in parts[1:])
        assert end in body
    return body
