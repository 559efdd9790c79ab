"""Fine-tuning of an adapter on instruction data: from files to files. The recipe is the paper's (arXiv 2303.16199)."""

import logging
import math
import os
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import llama_adapter_kernels as lak
from llama_adapter_kernels.errors import UserError
from llama_adapter_kernels.models import (
    load_model,
    load_tokenizer,
    pick_dtype,
    weights_fingerprint,
)
from llama_adapter_kernels.training.checkpoints import last_whole_checkpoint, step_of
from llama_adapter_kernels.training.data import read_conversations
from llama_adapter_kernels.training.memory import fitting_tokens
from llama_adapter_kernels.training.packing import StepDataset, StepPlan
from llama_adapter_kernels.training.preparation import (
    attach,
    attach_senses,
    check_budgets,
    check_media,
    check_tokens,
    encoder_of,
    fitted_settings,
)
from llama_adapter_kernels.training.run_folder import (
    CSV_FILE,
    RUN_FILE,
    TENSORBOARD_FOLDER,
    check_output,
    claim,
    data_fingerprint,
    prepare_output,
    remember_capacity,
    remembered_capacity,
)
from llama_adapter_kernels.training.settings import Execution, Settings, check_settings
from llama_adapter_kernels.training.templates import choose_template
from llama_adapter_kernels.training.tokens import Example, tokenize

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """What `finetune` did. `losses` are the logged ones by step (nats per response token)."""

    finished: bool
    step: int
    trainable_parameters: int
    total_parameters: int
    seconds: float
    losses: dict[int, float] = field(default_factory=dict)


def finetune(
    model: str,
    data: Path | Sequence[Path],
    output: Path,
    settings: Settings | None = None,
    execution: Execution | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    skip_bad_rows: bool = False,
) -> Outcome:
    """Fine-tunes an adapter for `model` (a folder or a hub name) on the rows in `data` and saves it in `output`.

    `data` are files or folders, see `read_conversations`.

    `output` receives zero_gate_adapter.json and the weights, checkpoint-*/ (adapter and optimizer), run.json (settings),
    training_log.csv and tensorboard/. Under torchrun the processes share every step.

    Raises:
        UserError: data, folders, settings or model do not fit; the message says what and where.
    """
    settings, execution = settings or Settings(), execution or Execution()
    check_settings(settings, execution)
    main_process = int(os.environ.get("RANK", "0")) == 0
    if main_process:
        check_output(output, resume=resume, overwrite=overwrite)
        if output.is_dir():
            with claim(output):  # or another process is training into it
                pass
    paths = [data] if isinstance(data, Path) else list(data)
    named = ", ".join(map(str, paths))
    rows = read_conversations(paths, skip_bad_rows=skip_bad_rows)
    check_media(named, rows, settings)
    encoder = encoder_of(settings)
    settings = fitted_settings(model, settings)
    tokenizer = load_tokenizer(model)
    template = choose_template(settings.template, tokenizer, rows)
    settings = replace(settings, template=template.name)
    assert settings.max_length is not None
    examples = tokenize(rows, tokenizer, settings.max_length, template)
    if not any(example.prompt_length < len(example) for example in examples):
        raise UserError(f"{named}: no example has room for a response within {settings.max_length} tokens")
    check_budgets(examples, settings, execution)
    network = load_model(model, pick_dtype(settings.dtype, on_cpu=execution.on_cpu))
    check_tokens(examples, network)
    run = {
        "model": model,
        "base_sha256": weights_fingerprint(model),
        "data_sha256": data_fingerprint(rows, examples),
        "settings": asdict(settings),
    }
    with claim(output) if main_process else nullcontext():
        if main_process:
            check_output(output, resume=resume, overwrite=overwrite)  # it may have been another process's meanwhile
            prepare_output(output, run, resume=resume)
        checkpoint = checkpoint_to_resume(output) if resume else None
        adapter = attach(network, settings, checkpoint)
        attach_senses(network, encoder, settings, execution, checkpoint)
        return train(network, adapter, examples, output, settings, execution, checkpoint=checkpoint)


def checkpoint_to_resume(output: Path) -> Path | None:
    """The newest whole checkpoint, with a word about newer ones that are not; None: from the beginning."""
    whole, broken = last_whole_checkpoint(output)
    for path, problem in broken.items():
        log.warning("%s is incomplete (%s): %s", path, problem, f"going on from {whole}" if whole else "not used")
    if whole is None:
        log.warning("%s: no whole checkpoint yet: starting from the beginning", output)
    return whole


def train(
    network: Any,
    adapter: "lak.ZeroGateAdapter",
    examples: list[Example],
    output: Path,
    settings: Settings,
    execution: Execution,
    *,
    checkpoint: Path | None = None,
    callbacks: Sequence[Any] = (),
) -> Outcome:
    """Trains the adapter of a loaded model and saves it in `output`, a folder that exists.

    Args:
        checkpoint: go on from here; the adapter must have been loaded from it.
        callbacks: further transformers TrainerCallbacks.

    Raises:
        UserError: as `finetune`.
    """
    import torch
    from transformers import TrainerState, TrainingArguments
    from transformers.trainer import TRAINER_STATE_NAME

    from llama_adapter_kernels.training import callbacks as reporting
    from llama_adapter_kernels.training import trainer as training

    check_budgets(examples, settings, execution)
    trainable = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
    plan = plan_steps(examples, settings)
    learning_rate = settings.learning_rate_for(plan.examples_per_step)
    arguments = TrainingArguments(
        output_dir=str(output),
        use_cpu=execution.on_cpu,
        per_device_train_batch_size=1,  # of micro-batches
        max_steps=plan.total_steps,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        weight_decay=settings.weight_decay,
        adam_beta1=settings.betas[0],
        adam_beta2=settings.betas[1],
        max_grad_norm=settings.max_gradient_norm,
        fp16=next(network.parameters()).dtype == torch.float16,  # scales the loss, or gradients would underflow
        **_checkpointing(TrainingArguments, execution),
        logging_steps=execution.log_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=not execution.progress_bar,
        save_strategy="steps",
        save_total_limit=execution.keep_checkpoints,
        dataloader_pin_memory=not execution.on_cpu,
        ddp_find_unused_parameters=False,
        remove_unused_columns=False,
        seed=settings.seed,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several GPUs: torchrun, never DataParallel
    micro_batches = micro_batches_of(plan, network, adapter, settings, execution, arguments, output, checkpoint)
    dataset = StepDataset(examples, plan, micro_batches)
    total_steps = plan.total_steps
    arguments.gradient_accumulation_steps = micro_batches // arguments.world_size
    arguments.save_steps = execution.save_steps or min(math.ceil(plan.steps_per_epoch), 500)
    arguments.warmup_steps = warmup_steps(settings, plan.steps_per_epoch, total_steps)

    own: list[Any] = [reporting.Progress(plan), reporting.LogEnds(), reporting.CsvLog(output / CSV_FILE)]
    if execution.tensorboard and arguments.process_index == 0:
        own += _tensorboard(output / TENSORBOARD_FOLDER)
    trainer = training.AdapterTrainer(
        network, adapter, arguments, dataset, settings.conditioning_rate, callbacks=[*own, *callbacks]
    )
    stop = reporting.StopOnSignal(trainer.any_rank)
    trainer.add_callback(stop)
    log.info(
        "%d examples, %d tokens; %d trainable of %d parameters; %d steps of %.4g examples in %d micro-batches, learning "
        "rate %.3g",
        len(examples), sum(map(len, examples)), trainable, sum(p.numel() for p in network.parameters()), total_steps,
        plan.examples_per_step, micro_batches, learning_rate,
    )  # fmt: skip
    started, done = time.monotonic(), step_of(checkpoint) if checkpoint else 0
    if done > total_steps:
        raise UserError(f"{output}: the run is at step {done} already, --epochs or --max-steps ask for {total_steps}")
    if done < total_steps:  # Trainer would do one step more of a run that has them all
        with stop.installed():
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    elif checkpoint:
        trainer.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    if trainer.failed_save:
        kept, _ = last_whole_checkpoint(output)
        hint = f"{kept} is whole: make room and go on with --resume" if kept else "nothing was saved"
        raise UserError(f"{output}: the last save failed: {trainer.failed_save}; {hint}")
    if not stop.stopped and trainer.is_world_process_zero():
        training.save_adapter(adapter, output)
    return Outcome(
        finished=not stop.stopped,
        step=max(done, trainer.state.global_step),
        trainable_parameters=trainable,
        total_parameters=sum(p.numel() for p in network.parameters()),
        seconds=time.monotonic() - started,
        losses={entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry},
    )


def plan_steps(examples: Sequence[Example], settings: Settings) -> StepPlan:
    """Which examples make up which step."""
    return StepPlan([len(example) for example in examples], settings.seed, batch_size=settings.batch_size,
                    tokens_per_step=settings.tokens_per_step, epochs=settings.epochs,
                    max_steps=settings.max_steps)  # fmt: skip


def micro_batches_of(
    plan: StepPlan, network: Any, adapter: "lak.ZeroGateAdapter", settings: Settings, execution: Execution,
    arguments: Any, output: Path, checkpoint: Path | None,
) -> int:  # fmt: skip
    """Into how many micro-batches each step is dealt out, over all processes."""
    processes = int(arguments.world_size)
    if execution.micro_batch_size is not None:
        return processes * math.ceil(plan.examples_per_step / (execution.micro_batch_size * processes))
    capacity = execution.tokens_per_micro_batch
    if capacity is None:
        capacity = remembered_capacity(output) if checkpoint else None
    if capacity is None:
        low = execution.gradient_checkpointing
        lowest = min(map(int, adapter.layers), default=0)
        layers = network.config.get_text_config().num_hidden_layers - lowest
        fitting = fitting_tokens(network, layers, arguments.device, low=low)
        capacity = max(least_of_processes(fitting, arguments.device), plan.longest)
    if arguments.process_index == 0 and (output / RUN_FILE).exists():
        remember_capacity(output, capacity)
    return plan.micro_batches(capacity, processes)


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


def _checkpointing(arguments: Any, execution: Execution) -> dict[str, Any]:
    """transformers has renamed gradient checkpointing; either name, and neither where it is not asked for."""
    if not execution.gradient_checkpointing:
        return {}
    name = "activation_checkpointing" if hasattr(arguments, "activation_checkpointing") else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}}


def _tensorboard(folder: Path) -> list[Any]:
    """The callback that writes losses for TensorBoard; none where it is not installed, with a word about it."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError:
        log.info("tensorboard is not installed: losses go to training_log.csv alone")
        return []
    from llama_adapter_kernels.training.callbacks import TensorBoardLog

    return [TensorBoardLog(folder)]
