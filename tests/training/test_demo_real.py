"""The demo on a real model, here on one of a few thousand weights: it trains, measures and reports."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

pytest.importorskip("matplotlib")
from llama_adapter_kernels.cli import app
from llama_adapter_kernels.demo import real
from llama_adapter_kernels.errors import UserError
from tests.support.tiny_model import save_tiny_model


@pytest.fixture
def material(tmp_path: Path) -> tuple[str, Path]:
    (tmp_path / "model").mkdir()
    rows = [{"instruction": f"Say {i}", "output": "aaa bbb aaa bbb"} for i in range(72)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    return str(save_tiny_model(tmp_path / "model")), tmp_path / "rows.json"


def test_the_held_out_loss_falls_and_the_report_says_so(
    material: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(real, "LEARNING_RATE", 0.2)  # one layer of random weights moves slowly
    model, data = material
    output = tmp_path / "demo"
    arguments = ["--model", model, "--data", str(data), "--output", str(output), "--steps", "12", "--device", "cpu"]
    run = CliRunner().invoke(app, ["demo-real", *arguments])
    assert run.exit_code == 0, run.output
    text = (output / "report.md").read_text()
    assert text in run.stdout
    before, after = (float(word.split()[0]) for word in text.split("token): **")[1].split("** ")[0].split(", ")[:2])
    assert after < before - 0.05
    for said in ("learns from rows.json", "**644 parameters**", "12 steps of 8 rows", "40 rows to learn from, 32 held out",
                 "`aaa bbb aaa bbb`", "**`Say "):  # fmt: skip
        assert said in text, said
    for picture in ("loss.png", "gates.png"):
        assert (output / picture).read_bytes().startswith(b"\x89PNG")
    assert (output / "zero_gate_adapter.json").exists()


def test_too_few_rows_and_steps_are_refused(material: tuple[str, Path], tmp_path: Path) -> None:
    model, data = material
    data.write_text(json.dumps(json.loads(data.read_text())[:63]))
    with pytest.raises(UserError, match=r"rows.json: expected at least 64 rows, 32 to hold out; got 63"):
        real.run(model, data, tmp_path / "demo", steps=1)
    with pytest.raises(UserError, match="--steps: expected at least 1, got 0"):
        real.run(model, data, tmp_path / "demo", steps=0)
    assert not (tmp_path / "demo").exists()
