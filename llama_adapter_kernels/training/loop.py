"""The training of an adapter in a loaded model, by transformers' Trainer."""

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import llama_adapter_kernels as lak
from llama_adapter_kernels.devices import pick_device
from llama_adapter_kernels.errors import UserError
from llama_adapter_kernels.training.checkpoints import CHECKPOINT, last_whole_checkpoint, step_of
from llama_adapter_kernels.training.memory import fitting_tokens, layers_with_gradients, recompute
from llama_adapter_kernels.training.packing import StepDataset, StepPlan
from llama_adapter_kernels.training.preparation import check_budgets
from llama_adapter_kernels.training.run_folder import RUN_FILE, remember_capacity, remembered_capacity
from llama_adapter_kernels.training.settings import Execution, Settings
from llama_adapter_kernels.training.sharding import shard_frozen
from llama_adapter_kernels.training.tokens import Example

log = logging.getLogger(__name__)

COMPILE_BACKEND = "inductor"
_EVAL_TOKENS = 4096  # of a batch to measure the held-out loss on: nothing is kept for a backward pass


@dataclass(frozen=True)
class Outcome:
    """What `finetune` did. Losses are the logged ones by step (nats per response token)."""

    finished: bool
    step: int
    trainable_parameters: int
    total_parameters: int
    seconds: float
    losses: dict[int, float] = field(default_factory=dict)
    held_out_losses: dict[int, float] = field(default_factory=dict)
    best_step: int | None = None  # whose adapter was saved, where a loss was held out to choose by


def train(
    network: Any,
    adapter: "lak.ZeroGateAdapter",
    examples: list[Example],
    output: Path,
    settings: Settings,
    execution: Execution,
    *,
    held_out: Sequence[Example] = (),
    checkpoint: Path | None = None,
    callbacks: Sequence[Any] = (),
) -> Outcome:
    """Trains the adapter of a loaded model and saves it in `output`, a folder that exists.

    Args:
        held_out: the loss on these decides which checkpoint is the best, and what is saved in the end.
        checkpoint: go on from here; the adapter must have been loaded from it.
        callbacks: further transformers TrainerCallbacks.

    Raises:
        UserError: as `finetune`.
    """
    import torch
    from transformers import TrainerState
    from transformers.trainer import TRAINER_STATE_NAME

    from llama_adapter_kernels.training import callbacks as reporting
    from llama_adapter_kernels.training import trainer as training
    from llama_adapter_kernels.training.held_out import Best, HeldOut
    from llama_adapter_kernels.training.reporters import reporters

    check_budgets(examples, settings, execution)
    trainable = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
    plan = plan_steps(examples, settings)
    learning_rate = settings.learning_rate_for(plan.examples_per_step)
    device = device_of(execution)
    arguments = training.Arguments(
        output_dir=str(output),
        use_cpu=device.type == "cpu",
        per_device_train_batch_size=1,  # of micro-batches
        max_steps=plan.total_steps,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        weight_decay=settings.weight_decay,
        adam_beta1=settings.betas[0],
        adam_beta2=settings.betas[1],
        max_grad_norm=settings.max_gradient_norm,
        fp16=next(network.parameters()).dtype == torch.float16,  # scales the loss, or gradients would underflow
        logging_steps=execution.log_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=not execution.progress_bar,
        save_strategy="steps",
        save_total_limit=execution.keep_checkpoints,
        dataloader_pin_memory=device.type == "cuda",
        ddp_find_unused_parameters=False,
        remove_unused_columns=False,
        seed=settings.seed,
    )
    arguments.place_on(device)
    if execution.shard and arguments.world_size > 1:
        shard_frozen(network, arguments.device)
    elif execution.shard:
        log.warning("--shard: there is one process, which has all of the model; torchrun starts several")
    if execution.low_memory:
        recompute(network)
    micro_batches = micro_batches_of(plan, network, execution, arguments, output, checkpoint)
    longest = compiled(network, max(map(len, [*examples, *held_out]))) if execution.compile else None
    dataset = StepDataset(examples, plan, micro_batches, longest)
    total_steps = plan.total_steps
    arguments.gradient_accumulation_steps = micro_batches // arguments.world_size
    arguments.save_steps = execution.save_steps or min(math.ceil(plan.steps_per_epoch), 500)
    arguments.warmup_steps = warmup_steps(settings, plan.steps_per_epoch, total_steps)

    own: list[Any] = [reporting.Progress(plan), reporting.LogEnds()]
    if arguments.process_index == 0:
        own += reporters(execution, output, bool(held_out), asdict(settings))
    trainer = training.AdapterTrainer(
        network,
        adapter,
        arguments,
        dataset,
        settings.conditioning_rate,
        settings.autocast,
        callbacks=[*own, *callbacks],
    )
    best = None
    if held_out:
        best = Best(settings.eval_steps or math.ceil(plan.steps_per_epoch), settings.early_stopping)
        measured = HeldOut(held_out, _EVAL_TOKENS, arguments.process_index, arguments.world_size, longest)
        trainer.measure(measured, best)
    stop = reporting.StopOnSignal(trainer.any_rank)
    trainer.add_callback(stop)
    log.info(
        "%d examples, %d tokens; %d trainable of %d parameters; %d steps of %.4g examples in %d micro-batches, learning "
        "rate %.3g",
        len(examples), sum(map(len, examples)), trainable, sum(p.numel() for p in network.parameters()), total_steps,
        plan.examples_per_step, micro_batches, learning_rate,
    )  # fmt: skip
    started, done = time.monotonic(), step_of(checkpoint) if checkpoint else 0
    check_steps(output, plan, checkpoint)
    saved = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME)) if checkpoint else None
    if best is not None and saved is not None:
        best.restore(saved)
    if done < total_steps and not (
        best is not None and best.out_of_patience
    ):  # Trainer would do one step more of a run that has them all
        with stop.installed():
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    elif saved is not None:
        trainer.state = saved
    if trainer.failed_save:
        kept, _ = last_whole_checkpoint(output)
        hint = f"{kept} is whole: make room and go on with --resume" if kept else "nothing was saved"
        raise UserError(f"{output}: the last save failed: {trainer.failed_save}; {hint}")
    chosen = output / f"{CHECKPOINT}{best.step}" if best is not None else None
    if not stop.stopped and trainer.is_world_process_zero():
        if chosen is not None and chosen.exists():
            training.copy_adapter(chosen, output)
        else:
            if best is not None and best.step:
                log.warning("%s is gone: the last adapter is saved instead", chosen)
            training.save_adapter(adapter, output)
    return Outcome(
        finished=not stop.stopped,
        step=max(done, trainer.state.global_step),
        trainable_parameters=trainable,
        total_parameters=sum(p.numel() for p in network.parameters()),
        seconds=time.monotonic() - started,
        losses={entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry},
        held_out_losses={
            entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry
        },
        best_step=best.step if best is not None else None,
    )


def plan_steps(examples: Sequence[Example], settings: Settings) -> StepPlan:
    """Which examples make up which step."""
    return StepPlan([len(example) for example in examples], settings.seed, batch_size=settings.batch_size,
                    tokens_per_step=settings.tokens_per_step, epochs=settings.epochs,
                    max_steps=settings.max_steps)  # fmt: skip


def check_steps(output: Path, plan: StepPlan, checkpoint: Path | None) -> None:
    """Raises UserError where the run to go on with already has more steps than it is to have."""
    done = step_of(checkpoint) if checkpoint else 0
    if done > plan.total_steps:
        raise UserError(
            f"{output}: the run is at step {done} already, --epochs or --max-steps ask for {plan.total_steps}"
        )


def device_of(execution: Execution) -> Any:
    """The torch.device of a run, with no number where every process has its own.

    Raises:
        UserError: there is no such device here.
    """
    return pick_device("cpu" if execution.on_cpu else execution.device)


def micro_batches_of(
    plan: StepPlan, network: Any, execution: Execution, arguments: Any, output: Path, checkpoint: Path | None
) -> int:
    """Into how many micro-batches each step is dealt out, over all processes."""
    processes = int(arguments.world_size)
    if execution.micro_batch_size is not None:
        return processes * math.ceil(plan.examples_per_step / (execution.micro_batch_size * processes))
    capacity = execution.tokens_per_micro_batch
    if capacity is None:
        capacity = remembered_capacity(output) if checkpoint else None
    if capacity is None:
        fitting = fitting_tokens(
            network, len(layers_with_gradients(network)), arguments.device, low=execution.low_memory
        )
        capacity = max(least_of_processes(fitting, arguments.device), plan.longest)
    if arguments.process_index == 0 and (output / RUN_FILE).exists():
        remember_capacity(output, capacity)
    return plan.micro_batches(capacity, processes)


def compiled(network: Any, longest: int) -> int:
    """Compiles a model's layers for packed batches of any number of tokens and sequences, at their next calls.

    Each layer by itself: those with an adapter share one graph and those without another, whatever their number, so that a
    model of 32 layers takes no longer to compile than one of three.

    Returns:
        The length that every batch is to report as that of its longest sequence: of another one each time, torch would
        compile again each time.
    """
    import torch
    from transformers.modeling_layers import GradientCheckpointingLayer

    # With and without adapter, gradient of the input, gradients at all, neighbours in the batch: more than torch's 8 kinds.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 32)
    layers = [module for module in network.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        from llama_adapter_kernels.training.loss import separate_head

        separate_head(network)  # it asks the model once by itself; let that not be compiled
    for part in layers or [network]:
        part.compile(dynamic=True, backend=COMPILE_BACKEND)
    return longest


def least_of_processes(number: int, device: Any) -> int:
    """The smallest of the numbers that the processes have; all must call it."""
    import torch
    from torch import distributed

    if not distributed.is_available() or not distributed.is_initialized():
        return number
    least = torch.tensor(number, device=device)
    distributed.all_reduce(least, op=distributed.ReduceOp.MIN)
    return int(least)


def warmup_steps(settings: Settings, steps_per_epoch: float, total_steps: int) -> int:
    """Steps of the linear warm-up; at most two fifths, as in the recipe, where a run is shorter than its warm-up."""
    return min(round(settings.warmup_epochs * steps_per_epoch), round(0.4 * total_steps))
