"""transformers' Trainer for an adapter: packed steps, exact loss normalisation, checkpoints whole or absent."""

import logging
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import ProgressCallback, Trainer, TrainingArguments
from transformers.modeling_utils import unwrap_model

from llama_adapter_kernels.errors import UserError
from llama_adapter_kernels.integrations.conditioning import ATTRIBUTE as CONDITIONING
from llama_adapter_kernels.integrations.quantised import counts_as_adapted
from llama_adapter_kernels.training.callbacks import LossProgress, RunningLoss
from llama_adapter_kernels.training.checkpoints import (
    CHECKPOINT,
    MANIFEST,
    STAGING,
    checkpoints,
    last_whole_checkpoint,
    publish,
    remove,
    step_of,
    what_is_broken,
    write_manifest,
)
from llama_adapter_kernels.training.held_out import Best, HeldOut
from llama_adapter_kernels.training.loss import response_loss
from llama_adapter_kernels.training.packing import StepDataset
from llama_adapter_kernels.training.sharding import is_sharded

log = logging.getLogger(__name__)

# A full disk, as Python, torch.save and safetensors report it.
SAVE_ERRORS = (OSError, RuntimeError, SafetensorError)


# What else than the adapter is in a checkpoint, by the beginning of the name.
_OF_TRAINING = ("optimizer", "scheduler", "scaler", "rng_state", "trainer_state", "training_args", MANIFEST)


def copy_adapter(checkpoint: Path, folder: Path) -> None:
    """The adapter of a checkpoint becomes the one in `folder`: each file is complete or absent.

    Raises:
        UserError: it cannot be written; an older one is as it was.
    """

    def copy(staging: Path) -> None:
        staging.mkdir(parents=True)
        for path in checkpoint.iterdir():
            if path.is_file() and not path.name.startswith(_OF_TRAINING):
                shutil.copyfile(path, staging / path.name)

    _save_aside(copy, folder)


def save_adapter(adapter: Any, folder: Path) -> None:
    """Saves the adapter's files in `folder`, which may hold other things: each is complete or absent.

    Raises:
        UserError: they cannot be written; older ones are as they were.
    """
    _save_aside(adapter.save_pretrained, folder)


def _save_aside(save: Callable[[Path], None], folder: Path) -> None:
    staging = folder / STAGING
    try:
        save(staging)
        for path in staging.iterdir():
            path.replace(folder / path.name)
    except SAVE_ERRORS as error:
        raise UserError(f"{folder}: the adapter could not be saved: {_first_line(error)}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


class Arguments(TrainingArguments):
    """transformers' arguments, with a device of one's own choice."""

    def place_on(self, device: torch.device) -> None:
        """One process runs on `device`. Under torchrun each has the one that it was given, and several GPUs in one process
        are never used (DataParallel): that is torchrun's part."""
        self._n_gpu = min(self.n_gpu, 1)
        if self.world_size > 1 or device.type == "cpu":
            return
        if device.index is None and device.type == "cuda":
            device = torch.device("cuda", 0)
        self.__dict__["_setup_devices"] = device  # the cached property that `device` reads
        self.distributed_state.device = device  # accelerate's, which moves the batches
        if device.type == "cuda":
            torch.cuda.set_device(device)


class AdapterTrainer(Trainer):
    """Trains what requires a gradient, here the adapter. `adapter` is attach_adapter's handle."""

    _staging: Path | None = None

    def __init__(
        self,
        model: nn.Module,
        adapter: Any,
        args: TrainingArguments,
        dataset: StepDataset,
        conditioning_rate: float = 1.0,
        autocast: bool = False,
        **more: Any,
    ) -> None:
        with counts_as_adapted(model):
            super().__init__(model=model, args=args, train_dataset=dataset, data_collator=_only_item, **more)
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(LossProgress())
        self.running_loss = RunningLoss(self)
        self.add_callback(self.running_loss)
        self.adapter = adapter
        self.conditioning_rate, self.autocast = conditioning_rate, autocast
        self.control: Any
        self.held_out: HeldOut | None = None
        self.best: Best | None = None
        self.failed_save: str | None = None
        # compute_loss divides by the tokens of the whole step; nothing is left to divide.
        self.loss_is_scaled_for_ga = True
        self.model_accepts_loss_kwargs = True

    def _get_train_sampler(self, *_: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)  # StepDataset shuffles by itself, the same for every rank

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> nn.Module:
        """accelerate must not wrap a base model in pieces, which its DDP refuses: this one averages the adapter alone."""
        if not (training and is_sharded(model)):
            wrapped: nn.Module = super()._wrap_model(model, training, dataloader)
            return wrapped
        prepared = self.accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)
        return nn.parallel.DistributedDataParallel(prepared, find_unused_parameters=False)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """This micro-batch's share of the step's loss: the mean over all response tokens of the step, on all ranks."""
        assert num_items_in_batch is not None, "Trainer counts the labels of every step"
        with self._precision():
            total, _ = response_loss(model, inputs)
        tokens = torch.as_tensor(num_items_in_batch, device=total.device).clamp(min=1)
        # Data parallel training averages gradients over the ranks, where the sum is wanted.
        return total * self.accelerator.num_processes / tokens

    def measure(self, held_out: HeldOut, best: Best) -> None:
        """Measures the loss on `held_out` whenever `best` asks for it, and never removes the best checkpoint."""
        self.held_out, self.best = held_out, best
        self.add_callback(best)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        assert self.held_out is not None, "only Best asks for evaluations"
        with self._precision():
            sums = self.held_out.sums(self.model, self.args.device)
        if self.args.world_size > 1:
            sums = self.accelerator.reduce(sums.to(self.args.device), reduction="sum")
        metrics = {"eval_loss": float(sums[0] / sums[1])}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _precision(self) -> torch.autocast:
        """Float32 weights, matrix products in bfloat16, where that is asked for."""
        return torch.autocast(self.args.device.type, torch.bfloat16, enabled=self.autocast)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # Trainer's estimate takes every parameter for trained

    def create_optimizer(self, *arguments: Any, **more: Any) -> Any:
        """The conditioning, where there is one, learns at a rate of its own; what starts as 1 does not decay towards 0."""
        optimizer = super().create_optimizer(*arguments, **more)
        ones = [p for name, p in self.adapter.named_parameters() if name.endswith((".scale", ".new_gate"))]
        _regroup(optimizer, ones, lambda group: {"weight_decay": 0.0})
        conditioning = getattr(unwrap_model(self.model), CONDITIONING, None)
        if conditioning is not None and self.conditioning_rate != 1.0:
            _regroup(optimizer, conditioning.parameters(), lambda group: {"lr": group["lr"] * self.conditioning_rate})
        return optimizer

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
        if self.any_rank(final.exists() and what_is_broken(final) is None):  # interrupted right after a save
            return
        self.running_loss.total = self.mean_of_ranks(self._tr_loss).item()
        staged, problem = output / STAGING / final.name, None
        self._staging = output / STAGING
        try:
            if self.args.should_save:
                shutil.rmtree(self._staging, ignore_errors=True)
            self._wait_for_everyone()
            super()._save_checkpoint(model, trial)
        except SAVE_ERRORS as error:
            problem = _first_line(error)
        finally:
            self._staging = None
        failed = self.any_rank(problem is not None)
        if not failed and self.args.should_save:
            try:
                write_manifest(staged)
            except SAVE_ERRORS as error:
                problem = _first_line(error)
        if failed or self.any_rank(problem is not None):
            self.failed_save = problem or "another process could not write"
            previous, _ = last_whole_checkpoint(output)
            kept = f"{previous} is whole" if previous else "there is no earlier one"
            log.warning("could not save %s: %s; %s; training goes on", final, self.failed_save, kept)
            shutil.rmtree(output / STAGING, ignore_errors=True)
            return
        self.failed_save = None
        if self.args.should_save:
            publish(staged, final)
            shutil.rmtree(output / STAGING, ignore_errors=True)
            self._remove_old(output)
        self._wait_for_everyone()

    def _remove_old(self, output: Path) -> None:
        """Newer checkpoints than this step are broken ones that the run was not resumed from; they get replaced."""
        paths = [path for path in checkpoints(output) if step_of(path) <= self.state.global_step]
        for path in paths[: -self.args.save_total_limit] if self.args.save_total_limit else []:
            if self.best is None or step_of(path) != self.best.step:
                remove(path)

    # ---- going on ----

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """A run that was made longer follows the longer run's schedule from here on."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            schedule = self.lr_scheduler
            factors = [factor(schedule.last_epoch) for factor in schedule.lr_lambdas]
            for group, base, factor in zip(self.optimizer.param_groups, schedule.base_lrs, factors, strict=True):
                group["lr"] = base * factor
            schedule._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        pass  # the adapter was loaded before: it has to be there when the optimizer is made

    def any_rank(self, flag: bool) -> bool:
        """Whether the flag is set on any process; all must call it."""
        if self.args.world_size == 1:
            return flag
        flags = torch.tensor([int(flag)], device=self.args.device)
        return bool(self.accelerator.reduce(flags, reduction="sum").item())

    def mean_of_ranks(self, value: Tensor) -> Tensor:
        """The mean of a scalar over all processes; all must call it."""
        return value if self.args.world_size == 1 else self.accelerator.reduce(value, reduction="mean")

    def _wait_for_everyone(self) -> None:
        if self.args.world_size > 1:
            self.accelerator.wait_for_everyone()


def _only_item(items: list[dict[str, Any]]) -> dict[str, Any]:
    return items[0]


def _first_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).strip().partition("\n")[0]


def _regroup(
    optimizer: Any, chosen: Iterable[nn.Parameter], change: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    """Gives some parameters groups of their own, with other options than those of the group that they are in."""
    own = {id(parameter) for parameter in chosen}
    for group in list(optimizer.param_groups):
        mine = [parameter for parameter in group["params"] if id(parameter) in own]
        if mine:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in own]
            options = {name: value for name, value in group.items() if name != "params"}
            optimizer.add_param_group({**options, **change(group), "params": mine})
