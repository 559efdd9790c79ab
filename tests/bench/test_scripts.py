"""The scripts of benchmarks/ run, on the smallest of their cases, and one of scripts/."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from llama_adapter_kernels.bench import cases, results

ROOT = Path(__file__).parents[2]


def script(name: str, folder: str = "benchmarks") -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{folder}_{name}", ROOT / folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_floors(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    floors = script("attention_floors")
    for name, dtype in floors.FLOORS:
        assert dtype in cases.cases("cpu")[name].dtypes
    monkeypatch.setattr(floors, "FLOORS", {("floor-4x8x512", "float32"): (1.6, 1.5)})
    monkeypatch.setattr(
        sys, "argv", ["attention_floors.py", "--rounds", "1", "--output", str(tmp_path / "floors.json")]
    )
    floors.main()
    assert "| (4, 8, 512, 64) | float32 |" in capsys.readouterr().out
    recorded = results.load(tmp_path / "floors.json")
    assert [(entry.mode, entry.peer) for entry in recorded.measurements] == [
        (mode, peer) for mode in ("forward", "forward+backward") for peer in ("two-sdpa", "ours-cpu")
    ]
    assert all(entry.status == "timed" for entry in recorded.measurements)


def test_adapter_step(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("peft")
    arguments = ["--rounds", "1", "--dtype", "float32", "--case", "generation"]
    monkeypatch.setattr(sys, "argv", ["adapter_step.py", *arguments])
    script("adapter_step").main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[1] for line in lines[1:]] == [
        "no adapter, plain SDPA", "two SDPA calls", "PEFT AdaptionPrompt", "attach_adapter",
    ]  # fmt: skip
    assert all(float(line.split()[-1]) > 0 for line in lines[1:])


def test_peft_attention(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("peft")
    compared = script("peft_attention")
    assert all(mode in cases.cases("cpu")[name].modes for name, mode, *_ in compared.RACES)
    monkeypatch.setattr(
        sys, "argv", ["peft_attention.py", "--rounds", "1", "--dtype", "float32", "--case", "module-1b-token"]
    )
    compared.main()
    said = capsys.readouterr().out
    assert said.startswith("Llama-3.2-1B attention module, one token, forward, float32: ")
    assert said.endswith("x (target 1.8)\n")


def test_pytest_benchmark_is_handed_the_samples(tmp_path: Path) -> None:
    """Two contestants of one race: both are in the report, with the times that the race measured."""
    chosen = ["--benchmark-json", str(tmp_path / "out.json"), "-k", "decode-7b-forward-float32-ours-cpu"]
    # pytest-benchmark times nothing in a worker of pytest-xdist, which this process may be.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    environment = inherited | {"BENCH_DEVICE": "cpu", "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-m", "pytest", "benchmarks", "-q", *chosen], cwd=ROOT, env=environment,
                         capture_output=True, text=True)  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    reported = json.loads((tmp_path / "out.json").read_text())["benchmarks"]
    assert [entry["params"]["peer"] for entry in reported] == ["ours-cpu", "ours-cpu-p0"]
    assert {entry["group"] for entry in reported} == {"decode-7b forward float32"}
    for entry in reported:
        assert entry["stats"]["rounds"] >= 5
        assert 1e-5 < entry["stats"]["median"] < 1


def test_many_adapters(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr(sys, "argv", ["many_adapters.py", "--shape", "small", "--rounds", "1", "--tokens", "2"])
    script("many_adapters").main()
    *contestants, last = capsys.readouterr().out.splitlines()
    assert [line[:22].rstrip() for line in contestants] == [
        "8 adapters, one batch", "1 adapter, one batch", "8 adapters, 8 runs"
    ]  # fmt: skip
    assert last.startswith("over 8 runs ") and float(last.split()[-1][:-1]) > 0


def test_errors_at_scale(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["errors_at_scale.py", "--problems", "2"])
    script("errors_at_scale", "scripts").main()
    assert capsys.readouterr().out.splitlines()[-1].startswith("14 results of 2 problems, ")
