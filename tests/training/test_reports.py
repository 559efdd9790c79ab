"""Where the losses of a run go: TensorBoard, Weights & Biases, nowhere."""

import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llama_adapter_kernels.errors import UserError
from llama_adapter_kernels.training import reporters
from llama_adapter_kernels.training.reporters import TensorBoardLog
from tests.support.runs import QUIET, SHORT, run
from tests.support.stand_ins import stand_in

ONE_STEP = replace(SHORT, max_steps=1)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ("csv,paper", "--report-to: expected csv, tensorboard, wandb with commas between, none or auto; got 'paper'"),
        ("auto,csv", "got 'auto'"),
        ("", "got ''"),
        ("wandb", "--report-to wandb: wandb is not installed: pip install wandb, or leave it out"),
    ],
)
def test_reports_that_go_nowhere(
    tiny_model: Path, rows_file: Path, tmp_path: Path, names: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=said):
        run(tiny_model, rows_file, tmp_path / "run", execution=replace(QUIET, report_to=names))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("names", "files"),
    [("none", set()), ("csv", {"training_log.csv"}), ("tensorboard, csv", {"training_log.csv", "tensorboard"})],
)
def test_reports_go_where_they_are_asked_to(
    tiny_model: Path, rows_file: Path, tmp_path: Path, names: str, files: set[str]
) -> None:
    if "tensorboard" in names:
        pytest.importorskip("tensorboard")
    outcome = run(tiny_model, rows_file, tmp_path / "run", ONE_STEP, execution=replace(QUIET, report_to=names))
    assert outcome.losses
    assert {path.name for path in (tmp_path / "run").iterdir()} & {"training_log.csv", "tensorboard"} == files


def test_without_tensorboard_there_is_one_word_about_it(
    tiny_model: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.setattr(reporters, "_installed", lambda name: name != "tensorboard")
    with caplog.at_level("INFO", logger="llama_adapter_kernels"):
        run(tiny_model, rows_file, tmp_path / "run", ONE_STEP, execution=replace(QUIET, tensorboard=True))
    assert caplog.text.count("tensorboard is not installed: losses go to training_log.csv alone") == 1
    assert not (tmp_path / "run" / "tensorboard").exists()
    with pytest.raises(UserError, match="--report-to tensorboard: tensorboard is not installed: pip install tensorb"):
        run(tiny_model, rows_file, tmp_path / "other", execution=replace(QUIET, report_to="tensorboard"))


class Recorded:
    """What a stand-in for wandb was told."""

    def __init__(self) -> None:
        self.begun: dict[str, Any] = {}
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.finished = self.broken = False

    def init(self, **options: Any) -> "Recorded":
        self.begun = options
        return self

    def log(self, values: dict[str, Any], step: int) -> None:
        if self.broken:
            raise ConnectionError("no network")
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished = True


def test_wandb_is_told_what_the_log_says(
    tiny_model: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = Recorded()
    stand_in(monkeypatch, "wandb", init=told.init)
    settings = replace(SHORT, max_steps=2, eval_fraction=0.2)
    outcome = run(tiny_model, rows_file, tmp_path / "run", settings, execution=replace(QUIET, report_to="wandb"))
    assert {step: values["loss"] for step, values in told.logged if "loss" in values} == outcome.losses
    assert any("eval_loss" in values for _, values in told.logged)
    assert (told.begun["group"], told.begun["config"]["epochs"], told.finished) == ("run", SHORT.epochs, True)


def test_wandb_without_a_network_is_not_the_end(
    tiny_model: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    told = Recorded()
    told.broken = True
    stand_in(monkeypatch, "wandb", init=told.init)
    assert run(tiny_model, rows_file, tmp_path / "run", execution=replace(QUIET, report_to="wandb")).finished
    assert caplog.text.count("wandb: no network; nothing more is sent there") == 1


def test_a_full_disk_for_tensorboard_is_not_the_end(
    tiny_model: Path, rows_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    execution = replace(QUIET, tensorboard=True)
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, logger="llama_adapter_kernels"):
        patch.setattr(EventFileWriter, "add_event", full)
        assert run(tiny_model, rows_file, tmp_path / "run", execution=execution).finished
    assert caplog.text.count("No space left on device; nothing more is written there") == 1
    # The folder itself cannot be made.
    (tmp_path / "other").mkdir()
    log = TensorBoardLog(tmp_path / "other" / "file" / "tensorboard")
    (tmp_path / "other" / "file").write_text("")
    state = type("State", (), {"is_world_process_zero": True, "is_hyper_param_search": False})()
    log.on_train_begin(None, state, None)
    assert log.tb_writer is None
