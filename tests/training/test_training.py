"""Training: losses are exact whatever the micro-batches, processes and interruptions; nothing is saved by halves."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llama_adapter_kernels.errors import UserError
from llama_adapter_kernels.models import load_model_and_tokenizer
from llama_adapter_kernels.training import finetune as fine_tuning
from llama_adapter_kernels.training import loop
from llama_adapter_kernels.training.callbacks import read_csv_log
from llama_adapter_kernels.training.checkpoints import STAGING, last_whole_checkpoint, step_of
from llama_adapter_kernels.training.data import read_rows
from llama_adapter_kernels.training.loop import Outcome, train
from llama_adapter_kernels.training.loss import response_loss
from llama_adapter_kernels.training.packing import pack
from llama_adapter_kernels.training.preparation import attach, fitted_settings
from llama_adapter_kernels.training.run_folder import CSV_FILE
from llama_adapter_kernels.training.settings import DEFAULT_MAX_LENGTH, Execution, Settings
from llama_adapter_kernels.training.tokens import tokenize
from tests.support.runs import QUIET, SHORT, run, weights


@pytest.fixture(scope="module")
def short_run(tiny_model: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, Path]:
    output = tmp_path_factory.mktemp("short") / "run"
    return run(tiny_model, rows_file, output), output


def test_only_the_adapter_is_saved(short_run: tuple[Outcome, Path], tiny_model: Path) -> None:
    outcome, output = short_run
    assert outcome.finished
    assert outcome.step == 6
    # One adapted layer of three (all but the lowest two): 10 prompt tokens of 64, 4 gates.
    assert outcome.trainable_parameters == 10 * 64 + 4
    for folder in (output, output / "checkpoint-5", output / "checkpoint-6"):
        assert sum(tensor.numel() for tensor in weights(folder).values()) == outcome.trainable_parameters
    assert sum(file.stat().st_size for file in output.rglob("*") if file.is_file()) < 300_000
    assert not (output / STAGING).exists()


def test_losses_are_what_a_plain_computation_gives(
    short_run: tuple[Outcome, Path], tiny_model: Path, rows_file: Path
) -> None:
    """At step 1 the gates are 0: the loss is the base model's, here sequence by sequence, without packing."""
    outcome, _ = short_run
    model, tokenizer = load_model_and_tokenizer(str(tiny_model), torch.float32)
    examples = tokenize(read_rows(rows_file), tokenizer, 512)
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(0)).tolist()
    total, count = 0.0, 0
    with torch.no_grad():
        for example in (examples[i] for i in order[:8]):
            logits = model(torch.tensor([example.tokens])).logits[0].double()
            tokens = torch.tensor(example.tokens)
            live = range(example.prompt_length, len(example))
            total -= sum(float(logits[i - 1].log_softmax(-1)[tokens[i]]) for i in live)
            count += len(live)
    assert outcome.losses[1] == pytest.approx(total / count, rel=1e-5)
    assert outcome.losses[6] != pytest.approx(outcome.losses[3], rel=1e-3)  # epochs differ: something was learned


@pytest.mark.parametrize("micro_batch_size", [1, 3, 8])
def test_micro_batches_do_not_change_the_losses(
    short_run: tuple[Outcome, Path], tiny_model: Path, rows_file: Path, tmp_path: Path, micro_batch_size: int
) -> None:
    execution = Execution(**{**QUIET.__dict__, "micro_batch_size": micro_batch_size, "gradient_checkpointing": True})
    outcome = run(tiny_model, rows_file, tmp_path / "run", execution=execution)
    expected, output = short_run
    assert outcome.losses == pytest.approx(expected.losses, rel=1e-5)
    for name, tensor in weights(output).items():
        torch.testing.assert_close(weights(tmp_path / "run")[name], tensor, rtol=1e-4, atol=1e-4)


def test_token_budgets_do_not_depend_on_micro_batches(tiny_model: Path, rows_file: Path, tmp_path: Path) -> None:
    """Steps of 512 tokens at once, in halves and in quarters: the same losses, also for the last, shorter step."""
    settings = replace(SHORT, tokens_per_step=512)
    runs = []
    for capacity in (512, 256, 128, None):
        execution = replace(QUIET, micro_batch_size=None, tokens_per_micro_batch=capacity)
        runs.append(run(tiny_model, rows_file, tmp_path / str(capacity), settings, execution=execution))
    assert runs[0].step > 3
    for other in runs[1:]:
        assert other.losses == pytest.approx(runs[0].losses, rel=1e-5)
    noted = [
        json.loads((tmp_path / name / "run.json").read_text())["tokens_per_micro_batch"] for name in ("256", "None")
    ]
    assert noted[0] == 256
    assert noted[1] >= 512


@pytest.mark.parametrize(
    ("settings", "execution", "said"),
    [
        ({"tokens_per_step": 20}, {}, r"--tokens-per-step: expected at least \d+, the longest example .*; got 20"),
        ({}, {"tokens_per_micro_batch": 20, "micro_batch_size": None},
         r"--tokens-per-micro-batch: expected at least \d+, the longest example .*; got 20"),
        ({}, {"tokens_per_micro_batch": 999}, "--micro-batch-size, --tokens-per-micro-batch: expected one of them"),
    ],
)  # fmt: skip
def test_budgets_that_fit_nothing(
    tiny_model: Path, rows_file: Path, tmp_path: Path, settings: dict[str, Any], execution: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        run(tiny_model, rows_file, tmp_path / "run", replace(SHORT, **settings), execution=replace(QUIET, **execution))
    assert not (tmp_path / "run").exists()


def test_more_processes_than_examples(
    tiny_model: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "23")
    with pytest.raises(UserError, match="expected at most as many processes as examples, 22; got 23"):
        run(tiny_model, rows_file, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_keeps_its_micro_batches(
    tiny_model: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However much memory is free then: other micro-batches would round otherwise."""
    execution = replace(QUIET, micro_batch_size=None)
    monkeypatch.setattr(loop, "fitting_tokens", lambda *_, **__: 300)
    run(tiny_model, rows_file, tmp_path / "run", replace(SHORT, max_steps=3), execution=execution)
    whole = run(tiny_model, rows_file, tmp_path / "whole", replace(SHORT, max_steps=6), execution=execution)
    monkeypatch.setattr(loop, "fitting_tokens", lambda *_, **__: pytest.fail("asked again"))
    longer = run(tiny_model, rows_file, tmp_path / "run", replace(SHORT, max_steps=6), execution=execution, resume=True)
    assert longer.losses.keys() == whole.losses.keys()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["tokens_per_micro_batch"] == 300


def command(model: Path, rows: Path, output: Path, *more: str) -> list[str]:
    options = ["--model", model, "--data", rows, "--output", output, "--epochs", 2, "--batch-size", 8,
               "--micro-batch-size", 4, "--base-learning-rate", 0.3, "--log-steps", 1, "--save-steps", 5,
               "--no-tensorboard", "--no-progress-bar", "--cpu", *more]  # fmt: skip
    return ["-m", "llama_adapter_kernels", "finetune", *map(str, options)]


def test_two_processes_give_the_losses_of_one(
    short_run: tuple[Outcome, Path], tiny_model: Path, rows_file: Path, tmp_path: Path
) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = [*torchrun, *command(tiny_model, rows_file, tmp_path / "run")]
    with subprocess.Popen(arguments, start_new_session=True) as launcher:
        try:
            assert launcher.wait(timeout=120) == 0
        finally:
            if launcher.poll() is None:
                os.killpg(launcher.pid, signal.SIGKILL)  # the launcher alone would leave its processes behind
    expected, output = short_run
    losses = {int(row["step"]): row["loss"] for row in read_csv_log(tmp_path / "run" / CSV_FILE)}
    assert losses == pytest.approx(expected.losses, rel=1e-5)
    for name, tensor in weights(output).items():
        torch.testing.assert_close(weights(tmp_path / "run")[name], tensor, rtol=1e-4, atol=1e-4)


def interrupt(arguments: list[str], output: Path, step: int, number: signal.Signals) -> tuple[int, str]:
    """Runs the command and sends the signal once `step` has been logged; returns (exit status, what it printed)."""
    with subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        deadline = time.monotonic() + 90
        while max((row["step"] for row in read_csv_log(output / CSV_FILE)), default=0) < step:
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(number)
        text, _ = process.communicate(timeout=60)
        return process.returncode, text


def test_killed_and_interrupted_runs_go_on_exactly(tiny_model: Path, rows_file: Path, tmp_path: Path) -> None:
    long = Settings(**{**SHORT.__dict__, "epochs": 60})
    expected = run(tiny_model, rows_file, tmp_path / "whole", long)
    assert expected.step == 180

    output = tmp_path / "cut"
    arguments = command(tiny_model, rows_file, output, "--epochs", "60")
    status, _ = interrupt(arguments, output, 12, signal.SIGKILL)
    assert status == -signal.SIGKILL
    assert last_whole_checkpoint(output)[0] is not None

    arguments.append("--resume")
    status, text = interrupt(arguments, output, read_csv_log(output / CSV_FILE)[-1]["step"] + 3, signal.SIGINT)
    assert status == 130, text
    assert "Traceback" not in text
    assert "--resume" in text
    [stopped] = {step_of(path) for path in [last_whole_checkpoint(output)[0]] if path}
    assert 12 < stopped < 180
    assert f"Stopped after step {stopped}" in text

    outcome = run(tiny_model, rows_file, output, long, resume=True)
    assert outcome.finished
    assert outcome.losses == expected.losses
    for name, tensor in weights(tmp_path / "whole").items():
        torch.testing.assert_close(weights(output)[name], tensor, rtol=0, atol=0)


def test_a_batch_without_live_labels_contributes_nothing(tiny_model: Path, rows_file: Path, tmp_path: Path) -> None:
    model, tokenizer = load_model_and_tokenizer(str(tiny_model), torch.float32)
    examples = [example.without_labels() for example in tokenize(read_rows(rows_file)[:8], tokenizer, 512)]
    settings = Settings(**{**SHORT.__dict__, "epochs": 1, "weight_decay": 0.0})
    outcome = train(model, attach(model, settings), examples, tmp_path, settings, QUIET)
    assert outcome.losses == {1: 0.0}
    assert all(torch.isfinite(tensor).all() for tensor in weights(tmp_path).values())
    total, count = response_loss(model, pack(examples))
    assert (total.item(), count) == (0.0, 0)
    gradients = torch.autograd.grad(total, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    assert all(gradient is None or not gradient.any() for gradient in gradients)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"epochs": 0}, "--epochs: expected at least 1, got 0"),
        ({"layers": 4}, "the model has 3 layers, got 4"),
        ({"base_learning_rate": math.nan}, "--base-learning-rate: expected a number from 0 to .*, got nan"),
        ({"weight_decay": math.inf}, "--weight-decay: expected a number from 0 to .*, got inf"),
        ({"warmup_epochs": math.nan}, "--warmup-epochs: expected a number"),
        ({"max_gradient_norm": -1.0}, "--max-gradient-norm: expected at least 0"),
        ({"seed": 2**32}, "--seed: expected at most 4,294,967,295"),
        ({"seed": -1}, "--seed: expected at least 0"),
        ({"epochs": 10**30}, "--epochs: expected at most"),
        ({"prefix_length": 10**12}, "--prefix-length: expected at most"),
        ({"gate": "sigmoid"}, "--gate: expected tanh or identity, got 'sigmoid'"),
        ({"gate_shape": "layer"}, "--gate-shape: expected head or scalar, got 'layer'"),
        ({"betas": (0.9, 1.0)}, "betas: expected two numbers"),
        ({"max_length": 513}, r"--max-length: expected at most 512 \(the model's context\), got 513"),
        ({"dtype": "float8"}, "--dtype: expected one of"),
        ({"dtype": "float16"}, "needs a GPU"),
        ({"max_length": 30}, "no example has room for a response"),
    ],
)
def test_settings_out_of_range(
    tiny_model: Path,
    rows_file: Path,
    tmp_path: Path,
    change: dict[str, Any],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Noticed before a weight is loaded, and nothing is written: the corrected command can be given as it is."""
    monkeypatch.setattr(fine_tuning, "load_model", lambda *_: pytest.fail("loaded"))
    with pytest.raises(UserError, match=said):
        run(tiny_model, rows_file, tmp_path / "run", Settings(**{**SHORT.__dict__, **change}))
    assert not (tmp_path / "run").exists()


def test_the_default_length_is_the_papers_or_the_models(tiny_model: Path, tmp_path: Path) -> None:
    assert fitted_settings(str(tiny_model), SHORT).max_length == 512
    shutil.copytree(tiny_model, tmp_path / "short")
    config = tmp_path / "short" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 100}))
    assert fitted_settings(str(tmp_path / "short"), SHORT).max_length == 100


def test_models_that_are_none(rows_file: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for model, said in (
        (tmp_path / "empty", "no config.json"),
        (tmp_path / "absent", "no such folder"),
        (rows_file, "a file"),
    ):
        with pytest.raises(UserError, match=said):
            run(model, rows_file, tmp_path / "run")
    (tmp_path / "empty" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="--model"):
        run(tmp_path / "empty", rows_file, tmp_path / "run")


def test_defaults_are_the_papers_recipe() -> None:
    settings = Settings()
    assert (settings.epochs, settings.warmup_epochs, settings.betas, settings.weight_decay) == (
        5,
        2.0,
        (0.9, 0.95),
        0.02,
    )
    assert DEFAULT_MAX_LENGTH == 512
    assert Settings(batch_size=256).learning_rate == pytest.approx(9e-3)
    assert Settings(batch_size=32).learning_rate == pytest.approx(9e-3 / 8)
