"""transformers' Trainer for an adapter: packed steps, exact loss normalisation, checkpoints whole or absent."""

import csv
import logging
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import (
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from llama_adapter_kernels.errors import UserError
from llama_adapter_kernels.training.packing import StepDataset, live_positions
from llama_adapter_kernels.training.run_folder import CHECKPOINT, checkpoints, last_checkpoint, step_of

log = logging.getLogger(__name__)

# A save goes here first and is renamed when it is complete. The dot keeps it out of every search for checkpoints.
STAGING = ".saving"
# A full disk, as Python, torch.save and safetensors report it.
SAVE_ERRORS = (OSError, RuntimeError, SafetensorError)


def save_adapter(adapter: Any, folder: Path) -> None:
    """Saves the adapter's files in `folder`, which may hold other things: each is complete or absent.

    Raises:
        UserError: they cannot be written; older ones are as they were.
    """
    staging = folder / STAGING
    try:
        adapter.save_pretrained(staging)
        for path in staging.iterdir():
            path.replace(folder / path.name)
    except SAVE_ERRORS as error:
        raise UserError(f"{folder}: the adapter could not be saved: {_first_line(error)}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def response_loss(model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, int]:
    """(sum of the cross-entropies of all response tokens in float32, their number) of a packed batch.

    The vocabulary is projected for these positions alone. A batch without any gives 0, with gradients of 0.
    """
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    positions, targets = live_positions(batch["labels"])
    logits = model(**inputs, use_cache=False, logits_to_keep=positions).logits
    return nn.functional.cross_entropy(logits[0].float(), targets, reduction="sum"), len(targets)


class AdapterTrainer(Trainer):
    """Trains what requires a gradient, here the adapter. `adapter` is attach_adapter's handle."""

    _staging: Path | None = None

    def __init__(
        self, model: nn.Module, adapter: Any, args: TrainingArguments, dataset: StepDataset, **more: Any
    ) -> None:
        super().__init__(model=model, args=args, train_dataset=dataset, data_collator=_only_item, **more)
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(LossProgress())
        self.adapter = adapter
        self.failed_save: str | None = None
        # compute_loss divides by the tokens of the whole step; nothing is left to divide.
        self.loss_is_scaled_for_ga = True
        self.model_accepts_loss_kwargs = True

    def _get_train_sampler(self, *_: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)  # StepDataset shuffles by itself, the same for every rank

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """This micro-batch's share of the step's loss: the mean over all response tokens of the step, on all ranks."""
        assert num_items_in_batch is not None, "Trainer counts the labels of every step"
        total, _ = response_loss(model, inputs)
        tokens = torch.as_tensor(num_items_in_batch, device=total.device).clamp(min=1)
        # Data parallel training averages gradients over the ranks, where the sum is wanted.
        return total * self.accelerator.num_processes / tokens

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # Trainer's estimate takes every parameter for trained

    # ---- saving ----

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging else super()._get_output_dir(trial)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.args.should_save:
            self.adapter.save_pretrained(output_dir)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Writes aside, then renames: a save that fails leaves the previous checkpoint as it was, and training goes on.

        All ranks take part and agree on the outcome.
        """
        output = Path(self.args.output_dir)
        final = output / f"{CHECKPOINT}{self.state.global_step}"
        if final.exists():  # interrupted right after a save
            return
        self._staging, problem = output / STAGING, None
        try:
            if self.args.should_save:
                shutil.rmtree(self._staging, ignore_errors=True)
            self._wait_for_everyone()
            super()._save_checkpoint(model, trial)
        except SAVE_ERRORS as error:
            problem = _first_line(error)
        finally:
            self._staging = None
        if self.any_rank(problem is not None):
            self.failed_save = problem or "another process could not write"
            previous = last_checkpoint(output)
            kept = f"{previous} is whole" if previous else "there is no earlier one"
            log.warning("could not save %s: %s; %s; training goes on", final, self.failed_save, kept)
            shutil.rmtree(output / STAGING, ignore_errors=True)
            return
        self.failed_save = None
        if self.args.should_save:
            os.rename(output / STAGING / final.name, final)
            shutil.rmtree(output / STAGING, ignore_errors=True)
            self._remove_old(output)
        self._wait_for_everyone()

    def _remove_old(self, output: Path) -> None:
        paths = sorted(checkpoints(output), key=step_of)
        for path in paths[: -self.args.save_total_limit] if self.args.save_total_limit else []:
            shutil.rmtree(path, ignore_errors=True)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        pass  # the adapter was loaded before: it has to be there when the optimizer is made

    def any_rank(self, flag: bool) -> bool:
        """Whether the flag is set on any process; all must call it."""
        if self.args.world_size == 1:
            return flag
        flags = torch.tensor([int(flag)], device=self.args.device)
        return bool(self.accelerator.reduce(flags, reduction="sum").item())

    def _wait_for_everyone(self) -> None:
        if self.args.world_size > 1:
            self.accelerator.wait_for_everyone()


class EpochOfData(TrainerCallback):
    """Tells the data set which epoch it is, from the number of steps done: exact after a resume."""

    def __init__(self, dataset: StepDataset) -> None:
        self.dataset = dataset

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.dataset.epoch = state.global_step // self.dataset.steps


class CsvLog(TrainerCallback):
    """step, epoch, loss, learning_rate, grad_norm of every logged step; after a resume, lines past it are dropped."""

    FIELDS = ("step", "epoch", "loss", "learning_rate", "grad_norm")

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            kept = [row for row in read_csv_log(self.path) if row["step"] <= state.global_step]
            self._write("w", kept)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        if state.is_world_process_zero and logs and "loss" in logs:
            self._write("a", [{"step": state.global_step, **logs}])

    def _write(self, mode: str, rows: list[dict[str, Any]]) -> None:
        try:
            with self.path.open(mode, newline="") as file:
                writer = csv.DictWriter(file, self.FIELDS, extrasaction="ignore")
                if mode == "w":
                    writer.writeheader()
                writer.writerows(rows)
        except OSError as error:  # a full disk must not end the training
            log.warning("%s: %s", self.path, error.strerror)


def read_csv_log(path: Path) -> list[dict[str, float]]:
    """The rows of `training_log.csv`; a last line cut short by a kill is left out."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{key: float(value) for key, value in row.items()} for row in rows if all(row.values())]


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


def _only_item(items: list[dict[str, Any]]) -> dict[str, Any]:
    return items[0]


def _first_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).strip().partition("\n")[0]
