"""The commands end to end, with measuring replaced by made-up times: what they print, write and return."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner, Result

from llama_adapter_kernels.bench import cases, machine, measure, regression, results, runner
from llama_adapter_kernels.cli import app
from llama_adapter_kernels.commands import races
from tests.support.made_up_results import example, measurement

RACES = [("llama-7b", "forward", "float32"), ("llama-1b", "forward", "float32")]
MACHINE = {"cpu": "Some CPU", "threads": 2, "our_instruction_set": "avx512", "torch": "2.13.0", "commit": "abc"}


class MadeUp:
    """Stands for the runner: two SDPA calls take 10 ms; ours, per race, what the test says, one value per run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **ours: list[float]) -> None:
        self.ours, self.ran = ours, []
        self.not_timed = ("wrong", "differs from the reference: output: error 1")
        plans = [plan for plan in runner.plan(cases.select("cpu"))
                 if (plan.case.name, plan.mode, plan.dtype) in RACES]  # fmt: skip
        monkeypatch.setattr(runner, "plan", lambda *arguments: list(plans))
        monkeypatch.setattr(runner, "run", self.run)
        monkeypatch.setattr(
            runner, "start", lambda *arguments: results.Results(MACHINE, {}, {"gemm_float32": 1e12}, "now")
        )
        monkeypatch.setattr(machine, "facts", lambda device: MACHINE)
        monkeypatch.setattr(measure, "clock_for", lambda device: None)

    def run(self, plans: list[runner.Plan], *arguments: object):
        for plan in plans:
            self.ran.append(plan.case.name)
            times = self.ours[plan.case.name.replace("-", "_")]
            time = times.pop(0) if len(times) > 1 else times[0]
            entry = measurement("ours-cpu", time, plan.case.name)
            if time is None:
                entry.status, entry.reason = self.not_timed
            yield [measurement("two-sdpa", 10.0, plan.case.name), measurement("sdpa", 9.0, plan.case.name), entry]


def bars(tmp_path: Path) -> Path:
    path = tmp_path / "bars.json"
    regression.record_bars(path, "Some CPU, 2 threads, avx512", {" ".join(race): [2.0] for race in RACES})
    return path


def command(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments] + ["--device", "cpu"])


def test_check_passes_and_measures_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_up = MadeUp(monkeypatch, llama_7b=[5.8], llama_1b=[4.0])  # 1.72x is 14% less than 2x
    run = command("bench-check", "--bars", bars(tmp_path))
    assert run.exit_code == 0, run.output
    assert made_up.ran == ["llama-7b", "llama-1b"]
    assert "ok   llama-7b forward float32: 1.72x over two SDPA calls, the bar is 2.00x (-14%)" in run.output


def test_check_fails_on_a_loss_over_15_percent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_up = MadeUp(monkeypatch, llama_7b=[6.0], llama_1b=[4.0])  # 1.67x is 17% less
    run = command("bench-check", "--bars", bars(tmp_path))
    assert run.exit_code == 1
    assert "LOSS llama-7b forward float32: 1.67x over two SDPA calls, the bar is 2.00x (-17%)" in run.output
    assert "ok   llama-1b forward float32" in run.output
    assert made_up.ran == ["llama-7b", "llama-1b", "llama-7b", "llama-7b"]  # only what was below its bar runs again


def test_check_forgives_a_disturbance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    MadeUp(monkeypatch, llama_7b=[9.0, 5.0], llama_1b=[4.0])
    assert command("bench-check", "--bars", bars(tmp_path)).exit_code == 0


def test_check_fails_on_wrong_results_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    MadeUp(monkeypatch, llama_7b=[None], llama_1b=[4.0])
    run = command("bench-check", "--bars", bars(tmp_path))
    assert run.exit_code == 1
    assert "LOSS llama-7b forward float32: not timed, the bar is 2.00x" in run.output
    assert "WRONG, not timed: ours-cpu (every race): differs from the reference: output: error 1" in run.output


def test_check_without_bars_tells_how_to_record_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_up = MadeUp(monkeypatch)
    path = tmp_path / "bars.json"
    regression.record_bars(path, "Another CPU", {})
    run = command("bench-check", "--bars", path)
    assert run.exit_code == 2
    assert "no bars for Some CPU, 2 threads, avx512; there are bars for: Another CPU" in run.output
    assert f"llama-adapter bench-check --bars {path} --record" in run.output
    path.unlink()
    missing = command("bench-check", "--bars", path)
    assert missing.exit_code == 2
    assert f"{path}: no such file; llama-adapter bench-check --bars {path} --record" in missing.output
    assert made_up.ran == []  # told at once, not after the measuring


def test_record_writes_the_median_of_the_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    MadeUp(monkeypatch, llama_7b=[5.0, 8.0, 4.0], llama_1b=[4.0])
    path = tmp_path / "bars.json"
    run = command("bench-check", "--bars", path, "--record")
    assert run.exit_code == 0, run.output
    recorded = json.loads(path.read_text())["bars"]["Some CPU, 2 threads, avx512"]
    assert recorded == {"llama-7b forward float32": 2.0, "llama-1b forward float32": 2.5}


def test_record_says_what_got_no_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    MadeUp(monkeypatch, llama_7b=[None], llama_1b=[4.0])
    run = command("bench-check", "--bars", tmp_path / "bars.json", "--record")
    assert run.exit_code == 1
    assert "no bar for llama-7b forward float32: not timed" in run.output
    assert "WRONG, not timed: ours-cpu" in run.output


def test_record_where_some_races_cannot_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_up = MadeUp(monkeypatch, llama_7b=[None], llama_1b=[4.0])
    made_up.not_timed = ("unavailable", "no instructions for it")
    path = tmp_path / "bars.json"
    run = command("bench-check", "--bars", path, "--record")
    assert run.exit_code == 0
    assert "not run: ours-cpu (llama-7b forward float32): no instructions for it" in run.output
    assert command("bench-check", "--bars", path).exit_code == 0  # the race that has no bar is no failure later


def test_bench_prints_a_table_and_writes_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    MadeUp(monkeypatch, llama_7b=[4.0], llama_1b=[5.0])
    run = command("bench", "--output", tmp_path / "a.json")
    assert run.exit_code == 0, run.output
    assert "2.50x" in run.output  # over two SDPA calls
    assert "2.25x" in run.output  # over plain SDPA
    assert len(results.load(tmp_path / "a.json").races()) == 2


def test_bench_reports_a_wrong_contestant(monkeypatch: pytest.MonkeyPatch) -> None:
    MadeUp(monkeypatch, llama_7b=[None], llama_1b=[5.0])
    run = command("bench")
    assert run.exit_code == 1
    assert "WRONG, not timed: ours-cpu (llama-7b forward float32): differs from the reference" in run.output


def test_bench_says_what_time_did_not_allow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_up = MadeUp(monkeypatch, llama_7b=[4.0], llama_1b=[5.0])
    monkeypatch.setattr(races, "time", SimpleNamespace(monotonic=lambda: 61.0 * len(made_up.ran)))
    run = command("bench", "--minutes", 1, "--output", tmp_path / "a.json")
    assert made_up.ran == ["llama-7b"]
    assert "time was over before 1 races (llama-1b forward float32)" in run.output
    assert f"--resume --output {tmp_path / 'a.json'}" in run.output
    rest = command("bench", "--resume", "--output", tmp_path / "a.json")
    assert rest.exit_code == 0, rest.output
    assert made_up.ran == ["llama-7b", "llama-1b"]
    assert len(results.load(tmp_path / "a.json").races()) == 2


@pytest.mark.parametrize(("arguments", "message"), [
    (["--case", "llama-7b", "--peer", "peft"], "expected for llama-7b one of sdpa, two-sdpa"),
    (["--case", "llama-7b-128", "--dtype", "bfloat16"], "no case has bfloat16 on cpu (llama-7b-128: float32)"),
])  # fmt: skip
def test_what_leaves_nothing_to_run_is_an_error(arguments: list[str], message: str) -> None:
    run = command("bench", *arguments)
    assert run.exit_code == 2
    assert message in run.output


def test_readme_elsewhere_is_one_line(tmp_path: Path) -> None:
    example().save(tmp_path / "a.json")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "README.md").write_text("")
    run = CliRunner().invoke(app, ["bench-report", str(tmp_path / "a.json"), "--output", str(tmp_path / "report"),
                                   "--readme", str(tmp_path / "docs" / "README.md")])  # fmt: skip
    assert run.exit_code == 2
    assert "a.json" in run.output
