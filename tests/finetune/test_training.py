"""Training: losses are exact whatever the micro-batches, processes and interruptions; nothing is saved by halves."""

import json
import logging
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from llama_adapter_kernels.data import Example, read_rows, tokenize
from llama_adapter_kernels.errors import UserError
from llama_adapter_kernels.finetune import Outcome, attach, finetune, train
from llama_adapter_kernels.models import load_model_and_tokenizer
from llama_adapter_kernels.packing import pack
from llama_adapter_kernels.run_folder import last_checkpoint, step_of
from llama_adapter_kernels.settings import Execution, Settings

trainer = pytest.importorskip("llama_adapter_kernels.trainer")
from safetensors.torch import load_file  # noqa: E402
from transformers import TrainerCallback  # noqa: E402

QUIET = Execution(micro_batch_size=4, log_steps=1, save_steps=5, tensorboard=False, progress_bar=False, on_cpu=True)
SHORT = Settings(epochs=2, batch_size=8, base_learning_rate=0.3)


def run(model: Path, rows: Path, output: Path, settings: Settings = SHORT, **more: Any) -> Outcome:
    return finetune(str(model), rows, output, settings, more.pop("execution", QUIET), **more)


@pytest.fixture(scope="module")
def short_run(tiny_model: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, Path]:
    output = tmp_path_factory.mktemp("short") / "run"
    return run(tiny_model, rows_file, output), output


def weights(folder: Path) -> dict[str, torch.Tensor]:
    [file] = folder.glob("*.safetensors")
    return load_file(file)


def test_only_the_adapter_is_saved(short_run: tuple[Outcome, Path], tiny_model: Path) -> None:
    outcome, output = short_run
    assert outcome.finished
    assert outcome.step == 6
    # One adapted layer of three (all but the lowest two): 10 prompt tokens of 64, 4 gates.
    assert outcome.trainable_parameters == 10 * 64 + 4
    for folder in (output, output / "checkpoint-5", output / "checkpoint-6"):
        assert sum(tensor.numel() for tensor in weights(folder).values()) == outcome.trainable_parameters
    assert sum(file.stat().st_size for file in output.rglob("*") if file.is_file()) < 300_000
    assert not (output / trainer.STAGING).exists()


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


def command(model: Path, rows: Path, output: Path, *more: str) -> list[str]:
    options = ["--model", model, "--data", rows, "--output", output, "--epochs", 2, "--batch-size", 8,
               "--micro-batch-size", 4, "--base-learning-rate", 0.3, "--log-steps", 1, "--save-steps", 5, "--no-tensorboard",
               "--no-progress-bar", "--cpu", *more]  # fmt: skip
    return ["-m", "llama_adapter_kernels", "finetune", *map(str, options)]


def test_two_processes_give_the_losses_of_one(
    short_run: tuple[Outcome, Path], tiny_model: Path, rows_file: Path, tmp_path: Path
) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*torchrun, *command(tiny_model, rows_file, tmp_path / "run")], check=True, timeout=120)
    expected, output = short_run
    losses = {int(row["step"]): row["loss"] for row in trainer.read_csv_log(tmp_path / "run" / trainer.CSV_FILE)}
    assert losses == pytest.approx(expected.losses, rel=1e-5)
    for name, tensor in weights(output).items():
        torch.testing.assert_close(weights(tmp_path / "run")[name], tensor, rtol=1e-4, atol=1e-4)


def interrupt(arguments: list[str], output: Path, step: int, number: signal.Signals) -> tuple[int, str]:
    """Runs the command and sends the signal once `step` has been logged; returns (exit status, what it printed)."""
    with subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        deadline = time.monotonic() + 90
        while max((row["step"] for row in trainer.read_csv_log(output / trainer.CSV_FILE)), default=0) < step:
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
    assert last_checkpoint(output) is not None

    arguments.append("--resume")
    status, text = interrupt(
        arguments, output, trainer.read_csv_log(output / trainer.CSV_FILE)[-1]["step"] + 3, signal.SIGINT
    )
    assert status == 130, text
    assert "Traceback" not in text
    assert "--resume" in text
    stopped = step_of(last_checkpoint(output))
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
    total, count = trainer.response_loss(model, pack(examples))
    assert (total.item(), count) == (0.0, 0)
    gradients = torch.autograd.grad(total, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    assert all(gradient is None or not gradient.any() for gradient in gradients)


class LimitFileSize(TrainerCallback):
    """From step `start` to step `end` no file can grow beyond a size: what a full disk does to a save."""

    def __init__(self, start: int, end: int, size: int) -> None:
        self.start, self.end, self.size = start, end, size

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        if state.global_step + 1 == self.start:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, hard))
        if state.global_step + 1 == self.end:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, hard))


@contextmanager
def unlimited_afterwards() -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.fixture
def small_examples(tiny_model: Path, rows_file: Path) -> tuple[Any, Any, list[Example]]:
    model, tokenizer = load_model_and_tokenizer(str(tiny_model), torch.float32)
    return model, attach(model, SHORT), tokenize(read_rows(rows_file), tokenizer, 512)


# 1 KB: the adapter's own file fails. 4 KB: it fits, and torch.save of the optimizer fails.
@pytest.mark.parametrize("size", [1024, 4096])
def test_a_full_disk_leaves_the_previous_checkpoint_whole(
    small_examples: tuple[Any, Any, list[Example]], tmp_path: Path, caplog: pytest.LogCaptureFixture, size: int
) -> None:
    execution = Execution(**{**QUIET.__dict__, "save_steps": 2, "keep_checkpoints": 10})
    with unlimited_afterwards(), caplog.at_level(logging.WARNING, logger="llama_adapter_kernels"):
        outcome = train(*small_examples, tmp_path, SHORT, execution, callbacks=[LimitFileSize(3, 5, size)])
    assert outcome.finished
    assert "could not save" in caplog.text
    assert "checkpoint-2 is whole" in caplog.text
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-6"]
    files = {path.name for path in (tmp_path / "checkpoint-6").iterdir()}
    assert files == {path.name for path in (tmp_path / "checkpoint-2").iterdir()}
    assert not (tmp_path / trainer.STAGING).exists()


def test_a_disk_full_to_the_end_says_what_is_left(
    small_examples: tuple[Any, Any, list[Example]], tmp_path: Path
) -> None:
    execution = Execution(**{**QUIET.__dict__, "save_steps": 2})
    with unlimited_afterwards(), pytest.raises(UserError, match=r"last save failed: .*checkpoint-2 is whole.*--resume"):
        train(*small_examples, tmp_path, SHORT, execution, callbacks=[LimitFileSize(3, 99, 1024)])
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


def test_output_folders(short_run: tuple[Outcome, Path], tiny_model: Path, rows_file: Path, tmp_path: Path) -> None:
    _, output = short_run
    with pytest.raises(UserError, match="--resume continues its run, --overwrite replaces it"):
        run(tiny_model, rows_file, output)
    with pytest.raises(UserError, match="expected one of them, got both"):
        run(tiny_model, rows_file, output, resume=True, overwrite=True)
    with pytest.raises(UserError, match=r"batch_size was 8, is 4; prefix_length was 10, is 3"):
        run(
            tiny_model,
            rows_file,
            output,
            Settings(**{**SHORT.__dict__, "batch_size": 4, "prefix_length": 3}),
            resume=True,
        )
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    for flag in ("resume", "overwrite"):
        with pytest.raises(UserError, match="nothing was touched"):
            run(tiny_model, rows_file, tmp_path / "mine", **{flag: True})
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    with pytest.raises(UserError, match="it is a file"):
        run(tiny_model, rows_file, rows_file)


def test_overwrite_and_resume_of_a_finished_run(tiny_model: Path, rows_file: Path, tmp_path: Path) -> None:
    settings = Settings(**{**SHORT.__dict__, "max_steps": 2})
    first = run(tiny_model, rows_file, tmp_path / "run", settings)
    assert first.step == 2
    again = run(tiny_model, rows_file, tmp_path / "run", settings, resume=True)
    assert again.finished
    assert again.losses == first.losses
    other = run(tiny_model, rows_file, tmp_path / "run", Settings(**{**settings.__dict__, "seed": 1}), overwrite=True)
    assert other.losses.keys() == first.losses.keys()
    assert other.losses != first.losses
    assert json.loads((tmp_path / "run" / "run.json").read_text())["settings"]["seed"] == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"epochs": 0}, "--epochs: expected at least 1, got 0"),
        ({"layers": 4}, "the model has 3 layers, got 4"),
        ({"dtype": "float8"}, "--dtype: expected one of"),
        ({"dtype": "float16"}, "needs a GPU"),
        ({"max_length": 30}, "no example has room for a response"),
    ],
)
def test_settings_out_of_range(
    tiny_model: Path, rows_file: Path, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        run(tiny_model, rows_file, tmp_path / "run", Settings(**{**SHORT.__dict__, **change}))


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
    assert settings.max_length == 512
    assert Settings(batch_size=256).learning_rate == pytest.approx(9e-3)
    assert Settings(batch_size=32).learning_rate == pytest.approx(9e-3 / 8)
