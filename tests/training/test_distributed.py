"""Several processes give the losses of one, whole or sharded, and a run goes on with another number of them."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import llama_adapter_kernels as lak
from llama_adapter_kernels.errors import UserError
from llama_adapter_kernels.training.checkpoints import what_is_broken
from llama_adapter_kernels.training.settings import Execution
from llama_adapter_kernels.training.sharding import heed_launcher, shard_frozen
from tests.support.distributed_runs import EXECUTION, HELD_OUT, SHORT, copy_until
from tests.support.runs import run, weights
from tests.support.small_models import build

ROOT = Path(__file__).parents[2]
ALIKE = ["ddp-4", "fsdp-4", "fsdp-2", "fsdp-4-to-2", "fsdp-4-to-ddp-2"]


@pytest.fixture(scope="module")
def folder(tiny_model: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What four and two processes left of the scenarios in support/distributed_runs.py."""
    folder = tmp_path_factory.mktemp("processes")
    (folder / "model").symlink_to(tiny_model)
    (folder / "rows.json").symlink_to(rows_file)
    command = [sys.executable, "-m", "tests.support.processes", "tests.support.distributed_runs", str(folder)]
    with subprocess.Popen(command, cwd=ROOT, start_new_session=True, stderr=subprocess.PIPE, text=True) as process:
        try:
            _, said = process.communicate(timeout=300)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, said
    return folder


@pytest.fixture(scope="module")
def alone(tiny_model: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    output = tmp_path_factory.mktemp("alone") / "run"
    return run(tiny_model, rows_file, output, execution=EXECUTION), output


def outcome(folder: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    for losses in ("losses", "held_out_losses"):
        found[losses] = {int(step): loss for step, loss in found[losses].items()}
    return found


@pytest.mark.parametrize("name", ALIKE)
def test_several_processes_give_the_losses_of_one(folder: Path, alone: tuple[Any, Path], name: str) -> None:
    expected, output = alone
    assert outcome(folder, name)["losses"] == pytest.approx(expected.losses, rel=1e-5)
    for key, tensor in weights(output).items():
        torch.testing.assert_close(weights(folder / name)[key], tensor, rtol=1e-4, atol=1e-4)


def test_a_sharded_run_saves_what_one_process_saves(folder: Path, alone: tuple[Any, Path]) -> None:
    """One adapter file; the checkpoint's other files are those of one process but for a random state of each."""
    _, output = alone

    def names(run: Path) -> set[str]:
        found = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
        return {name for name in found if "rng_state" not in name}

    assert names(folder / "fsdp-4") == names(output)
    assert what_is_broken(folder / "fsdp-4" / "checkpoint-6") is None
    assert len(list((folder / "fsdp-4" / "checkpoint-6").glob("rng_state_*"))) == 4
    for key, tensor in weights(folder / "fsdp-4").items():
        assert torch.equal(weights(folder / "fsdp-4" / "checkpoint-6")[key], tensor)


def test_a_sharded_run_goes_on_in_one_process(
    folder: Path, alone: tuple[Any, Path], tiny_model: Path, rows_file: Path, tmp_path: Path
) -> None:
    copy_until(folder / "fsdp-4", tmp_path / "run", 2)
    expected, _ = alone
    found = run(tiny_model, rows_file, tmp_path / "run", execution=EXECUTION, resume=True)
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)


def test_each_process_has_its_part_of_the_frozen_model(folder: Path) -> None:
    sizes = json.loads((folder / "sizes.json").read_text())
    assert sizes["here"] * 4 == pytest.approx(sizes["whole"], rel=0.01)
    assert outcome(folder, "pieces")["total_parameters"] == sizes["whole"] + 10 * 64 + 4


def test_accelerates_variables_shard(folder: Path, tiny_model: Path, rows_file: Path, tmp_path: Path) -> None:
    """With activation checkpointing, and a held-out loss that the processes share."""
    expected = run(tiny_model, rows_file, tmp_path / "run", HELD_OUT, execution=EXECUTION)
    found = outcome(folder, "launched")
    assert found["losses"] == pytest.approx(expected.losses, rel=1e-5)
    assert found["held_out_losses"] == pytest.approx(expected.held_out_losses, rel=1e-5)
    assert found["best_step"] == expected.best_step


def test_what_accelerate_launch_asks_for() -> None:
    asked = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1", "FSDP_ACTIVATION_CHECKPOINTING": "true"}
    environment = dict(asked, OTHER="1")
    found = heed_launcher(Execution(), environment)
    assert found.shard and found.gradient_checkpointing
    assert "ACCELERATE_USE_FSDP" not in environment and environment["OTHER"] == "1"
    assert heed_launcher(Execution(), {"ACCELERATE_USE_FSDP": "false"}) == Execution()


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"},
         "accelerate launch: DeepSpeed is not supported, since a frozen model has no gradients .* expected DDP or"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "accelerate launch: Megatron-LM is not supported"),
        ({"PARALLELISM_CONFIG_TP_SIZE": "2"}, "expected no TP .* parallelism"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_OFFLOAD_PARAMS": "true"}, "expected FSDP without offloading"),
    ],
)  # fmt: skip
def test_engines_that_are_refused(
    tiny_model: Path, rows_file: Path, tmp_path: Path, environment: dict[str, str], said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=said):
        run(tiny_model, rows_file, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_sharding_of_quantised_weights_is_refused() -> None:
    model = build()
    lak.attach_adapter(model, lak.AdapterConfig(num_layers=1))
    whole = model.model.layers[0].mlp.up_proj
    whole.weight = nn.Parameter(whole.weight.detach().to(torch.int8), requires_grad=False)
    with pytest.raises(
        UserError, match=r"model.layers.0.mlp.up_proj.weight is quantised \(torch.int8\): without --shard"
    ):
        shard_frozen(model, torch.device("cpu"))


def test_sharding_with_one_process_is_none(
    tiny_model: Path, rows_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = replace(SHORT, max_steps=1)
    with caplog.at_level("WARNING", logger="llama_adapter_kernels"):
        assert run(tiny_model, rows_file, tmp_path / "run", settings, execution=replace(EXECUTION, shard=True)).finished
    assert "--shard: there is one process, which has all of the model" in caplog.text
