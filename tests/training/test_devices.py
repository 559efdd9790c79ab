"""The device that a run is told to use."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from typer.testing import CliRunner

from llama_adapter_kernels import devices
from llama_adapter_kernels.cli import app
from llama_adapter_kernels.errors import UserError
from llama_adapter_kernels.training.trainer import Arguments
from tests.support.runs import QUIET, SHORT, run

ONE_STEP = replace(SHORT, max_steps=1)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("gpu", "--device: expected auto, cpu, cuda, cuda:N, mps or another device that torch knows, got 'gpu'"),
        ("cuda:x", "got 'cuda:x'"),
        ("meta", "--device meta: torch .* sees no meta device here"),
        ("cuda", "--device cuda: torch .* sees no cuda device here; cpu always works"),
        ("mps", "--device mps: torch .* sees no mps device here"),
    ],
)
def test_devices_that_are_not_here(
    tiny_model: Path, rows_file: Path, tmp_path: Path, name: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=said):
        run(tiny_model, rows_file, tmp_path / "run", execution=replace(QUIET, on_cpu=False, device=name))
    assert not (tmp_path / "run").exists()


def test_devices_that_are_here(monkeypatch: pytest.MonkeyPatch) -> None:
    assert devices.pick_device("cpu:0") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert devices.pick_device("auto").type == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert devices.pick_device("auto") == torch.device("cuda")
    assert devices.pick_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(UserError, match="cuda:2: expected one of the devices that are here, cuda:0, cuda:1"):
        devices.pick_device("cuda:2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert devices.pick_device("cuda") == torch.device("cuda")
    with pytest.raises(UserError, match="cuda:1: expected cuda without a number"):
        devices.pick_device("cuda:1")


@pytest.mark.parametrize("command", ["generate", "evaluate"])
def test_every_command_takes_a_device(command: str, tiny_model: Path, rows_file: Path, tmp_path: Path) -> None:
    where = {
        "generate": ["--instruction", "x"],
        "evaluate": ["held_out", "--data", str(rows_file), "--output", str(tmp_path / "out")],
    }[command]
    for device, said in (("gpu", "expected auto, cpu"), ("cuda:99", "--cpu, --device cuda:99: expected one of them")):
        more = ["--cpu"] if device != "gpu" else []
        result = CliRunner().invoke(app, [command, "--model", str(tiny_model), *where, "--device", device, *more])
        assert (result.exit_code, "Traceback" in result.output) == (2, False)
        assert said in result.stderr


def test_one_process_runs_where_it_is_told_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    arguments = Arguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    arguments.place_on(torch.device("cpu"))
    assert (arguments.device.type, arguments.n_gpu) == ("cpu", 0)
    arguments.place_on(torch.device("cuda", 1))
    assert arguments.device == arguments.distributed_state.device == chosen[0] == torch.device("cuda", 1)
    arguments.place_on(torch.device("mps"))
    assert arguments.device == torch.device("mps")
    arguments.place_on(torch.device("cuda"))
    assert arguments.device == torch.device("cuda", 0)
    AcceleratorState._reset_state(reset_partial_state=True)


def test_two_words_for_the_device(tiny_model: Path, rows_file: Path, tmp_path: Path) -> None:
    assert run(tiny_model, rows_file, tmp_path / "run", ONE_STEP, execution=replace(QUIET, on_cpu=False, device="cpu"))
    with pytest.raises(UserError, match="--memory: expected auto or low, got 'some'"):
        run(tiny_model, rows_file, tmp_path / "other", execution=replace(QUIET, memory="some"))
