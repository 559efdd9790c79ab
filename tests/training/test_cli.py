"""The command line as a whole: help is fast and complete, info says what is here."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import llama_adapter_kernels as lak
from llama_adapter_kernels.cli import app
from llama_adapter_kernels.commands.finetune import _losses


def test_help_names_every_command() -> None:
    text = CliRunner().invoke(app, ["--help"]).stdout
    for command in ("finetune", "generate", "demo", "info"):
        assert command in text


def run_python(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True)


def test_help_does_not_wait_for_torch() -> None:
    """Nor for anything else that is heavy: all helps together import none of it."""
    run_python(
        "import sys; from typer.testing import CliRunner; from llama_adapter_kernels.cli import app\n"
        "names = [command.name or command.callback.__name__.replace('_', '-') for command in app.registered_commands]\n"
        "assert len(names) >= 8\n"
        "for arguments in ([], *([name] for name in names)):\n"
        "    assert CliRunner().invoke(app, [*arguments, '--help']).exit_code == 0, arguments\n"
        "heavy = {'torch', 'numpy', 'transformers', 'matplotlib', 'huggingface_hub'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )


@pytest.mark.parametrize("order", ["llama_adapter_kernels, torch", "torch, llama_adapter_kernels"])
def test_the_import_is_light_and_registers_the_ops(order: str) -> None:
    """A program saved by torch.export finds its ops, whichever of the two was imported first."""
    run_python(
        "import importlib.util, sys, llama_adapter_kernels\n"
        "assert 'torch' not in sys.modules\n"
        "assert importlib.util.find_spec('torch') is not None  # looking for torch is not importing it\n"
        if order.startswith("llama")
        else ""
    )
    run_python(
        f"import {order}; torch.ops.llama_adapter_kernels.forward.default\n"
        "assert not [finder for finder in __import__('sys').meta_path if getattr(finder, 'library', '') == 'torch']"
    )


def test_every_public_name_is_there() -> None:
    assert set(lak.__all__) <= set(dir(lak))
    assert all(getattr(lak, name) is not None for name in lak.__all__)
    assert lak.zero_gate_attention is lak.zero_gate_attention
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        lak.nonsense  # noqa: B018


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


def test_version() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"llama-adapter-kernels {lak.__version__}\n")


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        ({1: 5.0}, "Loss 5.0000 (step 1)"),
        ({1: 5.0, 2: 4.0}, "Loss 5.0000 (step 1), then 4.0000 (step 2)"),
        ({1: 5.0, 10: 4.0, 14: 3.0}, "Loss 5.0000 (step 1), then 3.0000 (mean of steps 11 to 14)"),
    ],
)
def test_the_losses_in_a_line(losses: dict[int, float], said: str) -> None:
    assert _losses(losses) == said


def test_the_last_step_is_logged(tiny_model: Path, rows_file: Path, tmp_path: Path) -> None:
    options = ["--model", tiny_model, "--data", rows_file, "--output", tmp_path / "run", "--cpu", "--max-steps", 4,
               "--batch-size", 8, "--no-tensorboard", "--no-progress-bar"]  # fmt: skip
    result = CliRunner().invoke(app, ["finetune", *map(str, options)])
    assert result.exit_code == 0
    assert "(mean of steps 2 to 4)" in result.stdout


def test_what_a_terminal_cannot_show_is_escaped() -> None:
    code = (
        "import sys; from llama_adapter_kernels.cli import app\n"
        "app.command('say')(lambda: sys.stdout.write('caf\\u00e9 \\u4f60'))\n"
        "app(['say'])"
    )
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, env=environment)
    assert result.stdout == b"caf\xe9 \\u4f60"
