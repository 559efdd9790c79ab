"""Where losses go: training_log.csv, TensorBoard, Weights & Biases. None of them may end the training."""

import importlib.util
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback

from llama_adapter_kernels.errors import UserError
from llama_adapter_kernels.training.callbacks import CsvLog
from llama_adapter_kernels.training.run_folder import CSV_FILE, EVAL_FILE, TENSORBOARD_FOLDER
from llama_adapter_kernels.training.settings import Execution

log = logging.getLogger(__name__)

PROJECT = "llama-adapter"  # at Weights & Biases, unless WANDB_PROJECT says otherwise


def reports_of(execution: Execution) -> tuple[str, ...]:
    """What `--report-to` comes to here.

    Raises:
        UserError: something is asked for by name that is not installed.
    """
    if execution.reports == ("none",):
        return ()
    if execution.reports == ("auto",):
        return ("csv", "tensorboard") if execution.tensorboard and _installed("tensorboard") else ("csv",)
    for name in ("tensorboard", "wandb"):
        if name in execution.reports and not _installed(name):
            raise UserError(f"--report-to {name}: {name} is not installed: pip install {name}, or leave it out")
    return execution.reports


def reporters(execution: Execution, output: Path, held_out: bool, facts: dict[str, Any]) -> list[TrainerCallback]:
    """The callbacks that write losses.

    Args:
        held_out: there is a held-out loss, which has a file of its own.
        facts: what Weights & Biases shows as the run's configuration.
    """
    names = reports_of(execution)
    if execution.reports == ("auto",) and execution.tensorboard and "tensorboard" not in names:
        log.info("tensorboard is not installed: losses go to %s alone", CSV_FILE)
    found: list[TrainerCallback] = []
    if "csv" in names:
        found.append(CsvLog(output / CSV_FILE))
        if held_out:
            found.append(CsvLog(output / EVAL_FILE, ("step", "epoch", "eval_loss")))
    if "tensorboard" in names:
        found.append(TensorBoardLog(output / TENSORBOARD_FOLDER))
    if "wandb" in names:
        found.append(WandbLog(output, facts))
    return found


class TensorBoardLog(TensorBoardCallback):
    """TensorBoard's files, as long as they can be written: a full disk must not end the training."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.logging_dir = str(folder)
        self._failed = False

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._guarded(super().on_train_begin, args, kwargs)

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        self._guarded(super().on_log, args, kwargs)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self._guarded(super().on_train_end, args, kwargs)

    def _guarded(self, call: Callable[..., None], args: Any, kwargs: Any) -> None:
        if self._failed:
            return
        try:
            call(*args, **kwargs)
        except OSError as error:
            self._failed = True
            log.warning("%s: %s; nothing more is written there", self.logging_dir, error.strerror)


class WandbLog(TrainerCallback):
    """Everything logged goes to Weights & Biases too; wandb's own environment variables decide where, and whether online.

    A resumed run is one of its own there, in the group of the output folder's name; steps go on from where they were.
    """

    def __init__(self, output: Path, facts: dict[str, Any]) -> None:
        self.output, self.facts = output, facts
        self.run: Any = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        import wandb

        project, facts = os.environ.get("WANDB_PROJECT", PROJECT), {**self.facts, "steps": state.max_steps}
        try:
            self.run = wandb.init(project=project, group=self.output.name, dir=str(self.output), config=facts)
        except Exception as error:  # no account, no network: whatever a service raises
            log.warning("wandb: %s; nothing is sent there", " ".join(str(error).split())[:300])

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        if self.run is None or not logs:
            return
        try:
            self.run.log(dict(logs), step=state.global_step)
        except Exception as error:
            self.run = None
            log.warning("wandb: %s; nothing more is sent there", " ".join(str(error).split())[:300])

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.run is not None:
            self.run.finish()


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ValueError:  # a module without a specification, made while running
        return True
