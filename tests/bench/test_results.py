"""Result files, tables, the regression check and the report, on made-up measurements."""

import io
import json
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from rich.console import Console
from typer.testing import CliRunner

from llama_adapter_kernels.bench import analysis, plots, regression, report, results, tables
from llama_adapter_kernels.cli import app
from tests.support.made_up_results import example, measurement

ROOT = Path(__file__).parents[2]


def test_round_trip(tmp_path: Path) -> None:
    example().save(tmp_path / "a.json")
    loaded = results.load(tmp_path / "a.json")
    assert loaded == example()
    assert loaded.measurements[3].median == 4e-3
    lines = (tmp_path / "a.json").read_text().splitlines()  # one measurement per line, for people and for git
    assert [line.count('"peer":') for line in lines[-len(loaded.measurements) - 1 :]] == [1] * len(
        loaded.measurements
    ) + [0]


@pytest.mark.parametrize(("change", "reason"), [
    ({"version": 2}, "result version 2, this program reads version 1"),
    ({"version": None}, "result version None"),
    ({"format": "other"}, "not a result file"),
    ({"surprise": 1}, "unknown fields ['surprise']"),
    ({"measurements": [{"case": "x"}]}, "measurement 0: missing fields"),
    ({"measurements": 3}, "measurements: expected a list"),
])  # fmt: skip
def test_other_files_are_refused(tmp_path: Path, change: dict, reason: str) -> None:
    path = tmp_path / "a.json"
    example().save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(results.ResultError) as caught:
        results.load(path)
    assert reason in str(caught.value)
    run = CliRunner().invoke(app, ["bench-report", str(path), "--output", str(tmp_path / "report")])
    assert run.exit_code == 2
    assert reason in run.output


def test_what_is_no_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{")
    for name, reason in (("a.json", "not JSON"), ("b.json", "no such file")):
        with pytest.raises(results.ResultError, match=reason):
            results.load(tmp_path / name)


def test_merge_refuses_other_machines_and_repetition() -> None:
    other = example()
    with pytest.raises(results.ResultError, match="is in another file too"):
        results.merge([example(), other], ["a", "b"])
    other.machine = other.machine | {"cpu": "Another"}
    with pytest.raises(results.ResultError, match="cpu is 'Another', in a it is 'Some CPU'"):
        results.merge([example(), other], ["a", "b"])


@pytest.mark.parametrize(("option", "known"), [("--case", "roberta-large"), ("--peer", "two-sdpa-cudnn"),
                                               ("--dtype", "bfloat16")])  # fmt: skip
def test_unknown_names_list_the_known_ones(option: str, known: str) -> None:
    run = CliRunner().invoke(app, ["bench", option, "nonsense", "--device", "cpu"])
    assert run.exit_code == 2
    assert known in run.output
    assert "nonsense" in run.output


def test_an_existing_file_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("precious")
    run = CliRunner().invoke(app, ["bench", "--case", "llama-1b", "--device", "cpu", "--output", str(path)])
    assert run.exit_code == 2
    assert "--resume" in run.output
    assert path.read_text() == "precious"


def test_ratios() -> None:
    race = example().races()["llama-7b", "forward", "float32"]
    assert analysis.speedup(analysis.two_sdpa(race), analysis.fused(race)) == 2.5
    assert analysis.fused(race).peer == "ours-cpu"
    # A tile that only races choose is nobody's figure.
    assert analysis.fused(race | {"ours-cuda-32-keys": measurement("ours-cuda-32-keys", 1.0)}).peer == "ours-cpu"
    rates = analysis.rates(race["ours-cpu"], example().ceilings)
    assert rates.flops == pytest.approx(5e11)
    assert rates.share_of_memory == pytest.approx(7.5e9 / 2e10)


def test_a_ceiling_that_a_contestant_exceeds_is_not_shown() -> None:
    """Measured on a busy machine, the rate of a matrix product once made attention run at 397% of it."""
    busy = example()
    busy.ceilings["gemm_float32"] = 1e11  # two SDPA calls compute at twice that
    assert analysis.trusted_ceilings(busy) == {"copy": 1e10, "read": 2e10}
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(tables.terminal_table(busy, 200))
    assert "500 GFLOP/s" in console.export_text()
    assert "(500%)" not in console.export_text()
    assert "the machine was busy" in tables.remarks(busy)[0]
    busy.ceilings["gemm_float32"] = 1e13
    assert analysis.trusted_ceilings(busy) == busy.ceilings
    assert not any("busy" in line for line in tables.remarks(busy))


def test_regression(tmp_path: Path) -> None:
    bars = tmp_path / "bars.json"
    name = regression.processor(example())
    regression.record_bars(bars, name, {"a": [2.0], "b": [1.0, 2.0, 7.0], "c": [2.0]})
    assert regression.load_bars(bars, name) == {"a": 2.0, "b": 2.0, "c": 2.0}
    verdicts = regression.judge(regression.load_bars(bars, name), {"a": [1.71, 1.0], "b": [1.69]})
    assert [verdict.ok for verdict in verdicts] == [True, False, False]
    with pytest.raises(results.ResultError, match="no bars for Another"):
        regression.load_bars(bars, "Another")
    bars.write_text('{"version": 7, "bars": {}}')
    with pytest.raises(results.ResultError, match="bars of version 7"):
        regression.load_bars(bars, name)


def test_report_is_one_file_with_every_plot(tmp_path: Path) -> None:
    example().save(tmp_path / "a.json")
    run = CliRunner().invoke(app, ["bench-report", str(tmp_path / "a.json"), "--output", str(tmp_path / "report")])
    assert run.exit_code == 0, run.output
    page = (tmp_path / "report" / "report.html").read_text()
    assert page.count("<svg") == 5
    for outside in ("<script", "<link", "<img", "src=", "@import"):
        assert outside not in page
    assert "not run: ours-cuda" in page
    for name in ("overview", "speedup", "length", "roofline", "memory"):
        assert (tmp_path / "report" / f"{name}.png").stat().st_size > 5000


@pytest.mark.parametrize("peers", [("sdpa",), ("eager",), ("ours-cpu",), ("two-sdpa", "ours-cpu")])
@pytest.mark.parametrize("ceilings", [{}, {"gemm_float32": 8e14, "copy": 3e12}])
def test_report_of_few_contestants(peers: tuple[str, ...], ceilings: dict) -> None:
    few = example()
    few.ceilings = ceilings
    few.measurements = [entry for entry in few.measurements if entry.peer in peers]
    figures = plots.all_plots(few)
    assert ("overview" in figures) == ("speedup" in figures) == (set(peers) == {"two-sdpa", "ours-cpu"})
    assert "Every measurement" in report.page(few, {})


def texts(figure: Figure) -> list[tuple[str, Bbox]]:
    """What is written in a figure, and where. Ticks out of the axes' view are not drawn."""
    FigureCanvasAgg(figure).draw()
    hidden = set()
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        low, high = sorted(axis.get_view_interval())
        outside = [tick for tick in axis.get_major_ticks() if not low <= tick.get_loc() <= high]
        hidden |= {label for tick in outside for label in (tick.label1, tick.label2)}
    shown = (text for text in figure.findobj(Text) if text.get_text() and text.get_visible() and text not in hidden)
    return [(text.get_text(), text.get_window_extent().shrunk(0.98, 0.9)) for text in shown]


@pytest.mark.parametrize(("gemm", "memory"), [(2e10, 3e12), (1.5e11, 2e11), (8e14, 5e9)])
def test_labels_of_plots_do_not_overlap(gemm: float, memory: float) -> None:
    """On a machine with much memory bandwidth the roof's label once lay across the axis' label."""
    shown = example()
    shown.ceilings = {"gemm_float32": gemm, "copy": memory}
    shown.measurements += [
        measurement(peer, time, "decode", question="decode", sweep=None, flop=2e6, bytes=8e6)
        for peer, time in (("two-sdpa", 8.0), ("ours-cpu", 2.0))
    ]
    for name, figure in plots.all_plots(shown).items():
        found = texts(figure)
        for number, (first, box) in enumerate(found):
            assert not [other for other, its in found[number + 1 :] if box.overlaps(its)], (name, first)


@pytest.mark.parametrize("width", [80, 100, 160])
def test_terminal_table_fits(width: int) -> None:
    """No cell is cut: what does not fit is left out as a column, and said to be."""
    shown = example()
    for entry in shown.measurements:
        entry.label = {"two-sdpa": "two SDPA calls, padded to the longest"}.get(entry.peer, entry.peer)
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(tables.terminal_table(shown, width))
    text = console.export_text()
    assert "…" not in text
    assert max(len(line) for line in text.splitlines()) <= width
    for needed in ("ours-cpu", "4.00 ms", "2.50x", "2.00x", "longest", "LLaMA-7B", "float32"):
        assert needed in text, needed
    assert ("FLOP/s" in text) == (width > 80)
    assert ("a wider terminal shows also" in text) == (width < 160)


def test_remarks() -> None:
    found = example()
    found.measurements.insert(5, measurement("ours-triton", None))
    found.measurements[0].reason = "not captured as a graph: it synchronises"
    found.measurements[1].status, found.measurements[1].reason = "wrong", "differs"
    assert tables.remarks(found) == [
        "WRONG, not timed: two-sdpa (llama-7b forward float32): differs",
        "not run: ours-cuda, ours-triton (llama-7b forward float32): no",
        "timed all the same: sdpa (llama-7b forward float32): not captured as a graph: it synchronises",
    ]


def test_clocks_may_differ_between_files() -> None:
    first, second = example(), example()
    second.machine = second.machine | {"cpu_clock_mhz": 3000, "gpu_clocks_mhz": {"clocks.sm": "1980"}}
    for entry in second.measurements:
        entry.case += "-other"
    assert len(results.merge([first, second], ["a", "b"]).races()) == 2 * len(first.races())


def test_readme_block() -> None:
    table = tables.readme_table(example())
    text = f"before\n{tables.README_BEGIN}\nold\n{tables.README_END}\nafter"
    new = tables.insert_in_readme(text, table, ["benchmarks/results/a.json"])
    assert "old" not in new
    assert new.startswith("before")
    assert new.endswith("after")
    assert tables.recorded_files(new) == ["benchmarks/results/a.json"]
    assert tables.insert_in_readme(new, table, ["benchmarks/results/a.json"]) == new
    with pytest.raises(ValueError, match="expected one"):
        tables.insert_in_readme("no markers", table, [])


def test_readme_shows_the_recorded_figures() -> None:
    folder = ROOT / "benchmarks"
    text = (folder / "README.md").read_text()
    files = tables.recorded_files(text)
    assert files
    recorded = results.merge([results.load(folder / name) for name in files], files)
    assert tables.insert_in_readme(text, tables.readme_table(recorded), files) == text
    assert report.picture_title(recorded) in (folder / "speed.svg").read_text()
    assert "benchmarks/speed.svg" in (ROOT / "README.md").read_text()
