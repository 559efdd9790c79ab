"""The command line as a whole: help is fast and complete, info says what is here."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import llama_adapter_kernels as lak
from llama_adapter_kernels.cli import app
from llama_adapter_kernels.ops import backends


def test_help_names_every_command() -> None:
    text = CliRunner().invoke(app, ["--help"]).stdout
    for command in ("finetune", "generate", "demo", "info"):
        assert command in text


def test_help_does_not_import_transformers() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from llama_adapter_kernels.cli import app\n"
        "for command in ('finetune', 'generate', 'demo', 'info'):\n"
        "    assert CliRunner().invoke(app, [command, '--help']).exit_code == 0\n"
        "assert 'transformers' not in sys.modules and 'matplotlib' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_info() -> None:
    result = CliRunner().invoke(app, ["info"])
    assert result.exit_code == 0
    assert f"llama-adapter-kernels {lak.__version__}, torch {torch.__version__}" in result.stdout
    lines = [line.split(maxsplit=1) for line in result.stdout.splitlines() if line.startswith("  ")]
    said = {name: text for name, text in lines if name in backends.BACKENDS}
    assert said.keys() == set(backends.BACKENDS)
    if not torch.cuda.is_available():
        for backend, text in said.items():
            reason = backends.unavailable_reason(backend, "cpu")
            assert text == ("available" if reason is None else f"not available: {reason}")


def test_a_missing_package_is_named_with_its_remedy(
    tmp_path: Path, rows_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)  # import raises ModuleNotFoundError
    arguments = ["finetune", "--model", "some/model", "--data", str(rows_file), "--output", str(tmp_path / "run")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert "pip install 'llama-adapter-kernels[transformers]'" in result.stderr


def test_a_mistake_in_finetune_costs_one_line(tmp_path: Path) -> None:
    arguments = ["finetune", "--model", "m", "--data", "/absent.json", "--output", f"{tmp_path}/run"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert "error: /absent.json: No such file or directory" in result.stderr
    assert "Traceback" not in result.output
