"""Saving under trouble: a full disk never costs a checkpoint, no folder is overwritten unasked."""

import json
import logging
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from llama_adapter_kernels.errors import UserError
from llama_adapter_kernels.models import load_model_and_tokenizer
from llama_adapter_kernels.training.checkpoints import STAGING
from llama_adapter_kernels.training.data import read_rows
from llama_adapter_kernels.training.loop import train
from llama_adapter_kernels.training.preparation import attach
from llama_adapter_kernels.training.settings import Execution, Settings
from llama_adapter_kernels.training.tokens import Example, tokenize
from tests.support.runs import QUIET, SHORT, run


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
    assert not (tmp_path / STAGING).exists()


def test_a_disk_full_to_the_end_says_what_is_left(
    small_examples: tuple[Any, Any, list[Example]], tmp_path: Path
) -> None:
    execution = Execution(**{**QUIET.__dict__, "save_steps": 2})
    with unlimited_afterwards(), pytest.raises(UserError, match=r"last save failed: .*checkpoint-2 is whole.*--resume"):
        train(*small_examples, tmp_path, SHORT, execution, callbacks=[LimitFileSize(3, 99, 1024)])
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


def test_output_folders(tiny_model: Path, rows_file: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    run(tiny_model, rows_file, output)
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
    (tmp_path / "run" / "notes.txt").write_text("mine")
    other = run(tiny_model, rows_file, tmp_path / "run", Settings(**{**settings.__dict__, "seed": 1}), overwrite=True)
    assert other.losses.keys() == first.losses.keys()
    assert other.losses != first.losses
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"
    assert json.loads((tmp_path / "run" / "run.json").read_text())["settings"]["seed"] == 1
