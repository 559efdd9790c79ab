"""What happens beside training: the epoch of the data, logs that survive a full disk and a resume, stopping on a signal."""

import csv
import logging
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from llama_adapter_kernels.training.packing import StepPlan

log = logging.getLogger(__name__)


class Progress(TrainerCallback):
    """Says which epoch it is: to transformers a run is one long epoch, as steps may go on from one epoch into the next."""

    def __init__(self, plan: StepPlan) -> None:
        self.plan = plan

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        state.compute_steps(args, state.max_steps)  # intervals as asked for now, not those of the resumed checkpoint

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        state.epoch = state.global_step / self.plan.steps_per_epoch


class CsvLog(TrainerCallback):
    """step, epoch, loss, learning_rate, grad_norm of every logged step; or the held-out loss of every measurement.

    At the start the file is written again from the trainer's state, so that after a resume it holds what an uninterrupted
    run would have written, to the letter.
    """

    FIELDS = ("step", "epoch", "loss", "learning_rate", "grad_norm")

    def __init__(self, path: Path, fields: tuple[str, ...] = FIELDS) -> None:
        self.path, self.fields = path, fields

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            self._write("w", [entry for entry in state.log_history if self.fields[2] in entry])

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        if state.is_world_process_zero and logs and self.fields[2] in logs:
            self._write("a", [{"step": state.global_step, **logs}])

    def _write(self, mode: str, rows: list[dict[str, Any]]) -> None:
        try:
            with self.path.open(mode, newline="") as file:
                writer = csv.DictWriter(file, self.fields, extrasaction="ignore")
                if mode == "w":
                    writer.writeheader()
                writer.writerows(rows)
        except OSError as error:  # a full disk must not end the training
            log.warning("%s: %s", self.path, error.strerror)


def read_csv_log(path: Path) -> list[dict[str, float]]:
    """The rows of `training_log.csv`; a last line cut short by a kill is left out."""
    if not path.exists():
        return []
    whole, _, _ = path.read_text().rpartition("\n")
    rows = list(csv.DictReader(whole.splitlines()))
    return [{key: float(value) for key, value in row.items()} for row in rows if all(row.values())]


class LogEnds(TrainerCallback):
    """Logs the last step as well, so that the last logged loss is that of the end."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_log = True


class RunningLoss(TrainerCallback, ExportableState):
    """The loss summed since the last logged step goes into every checkpoint: a resumed run logs the same means.

    transformers saves the state of such callbacks in trainer_state.json.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.total = 0.0  # filled in before a save: all processes have a part in it

    def state(self) -> dict[str, Any]:
        logged_at = getattr(self.trainer, "_globalstep_last_logged", 0)  # asked for before training has begun as well
        return {"args": {}, "attributes": {"total": self.total, "logged_at": logged_at}}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        saved = state.stateful_callbacks.get(type(self).__name__)
        if saved and state.global_step > 0:  # Trainer has just begun a new mean
            self.trainer._tr_loss += saved["attributes"]["total"]
            self.trainer._globalstep_last_logged = saved["attributes"]["logged_at"]


class LossProgress(ProgressCallback):
    """A progress bar with the latest loss in it, instead of a line for every logged step."""

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{logs['loss']:.4f}")


class StopOnSignal(TrainerCallback):
    """After Ctrl-C or SIGTERM: finish the step, save, stop. All ranks stop at the same step. A second Ctrl-C kills."""

    def __init__(self, any_rank: Callable[[bool], bool]) -> None:
        self.received = False
        self.stopped = False
        self._any_rank = any_rank

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._any_rank(self.received):
            self.stopped = state.global_step < state.max_steps
            control.should_save = True
            control.should_training_stop = True

    @contextmanager
    def installed(self) -> Iterator[None]:
        first = 0.0

        def handler(number: int, frame: FrameType | None) -> None:
            nonlocal first
            if not self.received:
                self.received, first = True, time.monotonic()
                log.warning("stopping after this step and saving; press Ctrl-C again to quit without saving")
            elif time.monotonic() - first > 2:  # torchrun passes on a Ctrl-C that its processes got already
                raise KeyboardInterrupt

        previous = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, old in previous.items():
                signal.signal(number, old)
