"""`llama-adapter finetune`."""

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from llama_adapter_kernels.errors import UserError

Option = typer.Option


def finetune(
    model: Annotated[str, Option(help="Base model: a local Hugging Face folder or a hub name.")],
    data: Annotated[
        list[Path],
        Option(
            help="JSON, JSONL, Parquet or a folder; may be repeated. Alpaca rows, or chats: messages, conversations."
        ),
    ],
    output: Annotated[Path, Option(help="Folder for the adapter, its checkpoints and logs.")],
    eval_data: Annotated[
        list[Path] | None,
        Option(help="The same, held out: the best checkpoint by its loss is what is saved in the end."),
    ] = None,
    eval_fraction: Annotated[float | None, Option(help="Or hold out this part of --data.")] = None,
    eval_steps: Annotated[int | None, Option(help="Between held-out losses.  [default: an epoch]")] = None,
    early_stopping: Annotated[int | None, Option(help="Stop after so many held-out losses without a new best.")] = None,
    resume: Annotated[bool, Option("--resume", help="Go on with the run in OUTPUT from its last checkpoint.")] = False,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace the run in OUTPUT.")] = False,
    skip_bad_rows: Annotated[bool, Option("--skip-bad-rows", help="Leave out and count bad rows.")] = False,
    prefix_length: Annotated[int, Option(help="Prompt tokens per layer.")] = 10,
    layers: Annotated[int | None, Option(help="Topmost layers with prompts.  [default: all but the lowest 2]")] = None,
    gate: Annotated[str, Option(help="tanh or identity.")] = "tanh",
    gate_shape: Annotated[str, Option(help="head or scalar.")] = "head",
    v2: Annotated[bool, Option("--v2", help="Tune bias, scale, norms and a LoRA besides (LLaMA-Adapter V2).")] = False,
    lora_rank: Annotated[int, Option(help="Of the LoRA of --v2; 0: none.")] = 16,
    epochs: Annotated[int, Option(help="Passes over the data.")] = 5,
    warmup_epochs: Annotated[float, Option(help="Linear warm-up; at most 2/5 of the run.")] = 2.0,
    max_steps: Annotated[int | None, Option(help="Stop after so many steps, whatever --epochs says.")] = None,
    batch_size: Annotated[int | None, Option(help="Examples per step, over all processes.  [default: 64]")] = None,
    tokens_per_step: Annotated[int | None, Option(help="Or tokens per step, packed full.")] = None,
    tokens_per_micro_batch: Annotated[
        int | None, Option(help="Tokens per process at a time.  [default: what memory has room for]")
    ] = None,
    micro_batch_size: Annotated[int | None, Option(help="Or examples per process at a time, on average.")] = None,
    base_learning_rate: Annotated[float, Option(help="For 256 examples per step; scales with --batch-size.")] = 9e-3,
    weight_decay: Annotated[float, Option(help="AdamW's.")] = 0.02,
    max_gradient_norm: Annotated[float, Option(help="Clip the gradient's norm; 0: never.")] = 0.0,
    max_length: Annotated[
        int | None, Option(help="Tokens; longer examples are truncated.  [default: 512, at most the model's context]")
    ] = None,
    template: Annotated[
        str, Option(help="alpaca, chat (the tokenizer's), or auto: chat where rows are chats.")
    ] = "auto",
    dtype: Annotated[str, Option(help="auto, float32, bfloat16 or float16, of the base model.")] = "auto",
    gradient_checkpointing: Annotated[bool, Option("--gradient-checkpointing", help="Less memory, more time.")] = False,
    shard: Annotated[
        bool, Option("--shard", help="Split the frozen model over the processes of torchrun (FSDP2).")
    ] = False,
    save_steps: Annotated[int | None, Option(help="Between checkpoints.  [default: an epoch, at most 500]")] = None,
    keep_checkpoints: Annotated[int, Option(help="Older ones are removed.")] = 2,
    log_steps: Annotated[int, Option(help="Steps between logged losses.")] = 10,
    tensorboard: Annotated[bool, Option(help="Log to OUTPUT/tensorboard besides training_log.csv.")] = True,
    progress_bar: Annotated[bool, Option(help="Show one.")] = True,
    seed: Annotated[int, Option(help="Of prompts and the order of examples.")] = 0,
    init: Annotated[Path | None, Option(help="Start from this saved adapter: the second of two stages.")] = None,
    image_encoder: Annotated[str | None, Option(help="Rows have an image; transformers folder or hub name.")] = None,
    audio_encoder: Annotated[str | None, Option(help="Rows have audio; the same, or log-mel.")] = None,
    conditioning: Annotated[str, Option(help="queries, multi_scale, imagebind or mu_llama.")] = "queries",
    depths: Annotated[int | None, Option(help="Layers of the encoder that multi_scale and mu_llama read.")] = None,
    fusion: Annotated[str, Option(help="all, or early: the image in the first adapted layer alone.")] = "all",
    conditioning_rate: Annotated[float, Option(help="Learning rate of the conditioning over the adapter's.")] = 1.0,
    features: Annotated[Path | None, Option(help="Folder that keeps the encoder's features.")] = None,
    cpu: Annotated[bool, Option("--cpu", help="Use no GPU.")] = False,
) -> None:
    """Fine-tune an adapter on instructions. The base model stays frozen and only the adapter is saved.

    Defaults are the paper's recipe. Several GPUs or processes:
    torchrun --nproc-per-node N -m llama_adapter_kernels finetune ...
    """
    if batch_size is not None and tokens_per_step is not None:
        raise UserError("--batch-size, --tokens-per-step: expected one of them, got both")
    import torch

    from llama_adapter_kernels.training.finetune import finetune as run
    from llama_adapter_kernels.training.settings import Execution, Settings

    settings = Settings(
        prefix_length=prefix_length,
        layers=layers,
        gate=gate,
        gate_shape=gate_shape,
        v2=v2,
        lora_rank=lora_rank,
        epochs=epochs,
        warmup_epochs=warmup_epochs,
        max_steps=max_steps,
        batch_size=64 if batch_size is None else batch_size,
        tokens_per_step=tokens_per_step,
        base_learning_rate=base_learning_rate,
        weight_decay=weight_decay,
        max_gradient_norm=max_gradient_norm,
        max_length=max_length,
        eval_fraction=eval_fraction,
        eval_steps=eval_steps,
        early_stopping=early_stopping,
        template=template,
        dtype=dtype,
        seed=seed,
        init=None if init is None else str(init),
        image_encoder=image_encoder,
        audio_encoder=audio_encoder,
        conditioning=conditioning,
        conditioning_sizes=() if depths is None else (("depths", depths),),
        fusion=fusion,
        conditioning_rate=conditioning_rate,
    )
    execution = Execution(
        tokens_per_micro_batch=tokens_per_micro_batch,
        micro_batch_size=micro_batch_size,
        gradient_checkpointing=gradient_checkpointing,
        shard=shard,
        save_steps=save_steps,
        keep_checkpoints=keep_checkpoints,
        log_steps=log_steps,
        tensorboard=tensorboard,
        progress_bar=progress_bar,
        on_cpu=cpu or not torch.cuda.is_available(),
        features=None if features is None else str(features),
    )
    outcome = run(
        model,
        data,
        output,
        settings,
        execution,
        eval_data=eval_data or (),
        resume=resume,
        overwrite=overwrite,
        skip_bad_rows=skip_bad_rows,
    )
    if os.environ.get("RANK", "0") != "0":
        return
    if not outcome.finished:
        again = [argument for argument in sys.argv[1:] if argument not in ("--resume", "--overwrite")]
        typer.echo(f"Stopped after step {outcome.step}; everything up to there is saved in {output}. Go on with:")
        typer.echo(f"  llama-adapter {shlex.join([*again, '--resume'])}")
        raise typer.Exit(130)
    if outcome.losses:
        typer.echo(_losses(outcome.losses))
    if outcome.best_step is not None and outcome.held_out_losses:
        best = min(outcome.held_out_losses.values())
        typer.echo(f"Held-out loss {best:.4f} at its best, after step {outcome.best_step}: that adapter is saved")
    typer.echo(f"{outcome.step} steps in {outcome.seconds:.0f} s. The adapter is saved in {output}. Try it with:")
    typer.echo(f"  llama-adapter generate --model {shlex.quote(model)} --adapter {shlex.quote(str(output))}")


def _losses(losses: dict[int, float]) -> str:
    """First and last logged loss; a logged loss is the mean over the steps since the one before."""
    first, *others = sorted(losses)
    if not others:
        return f"Loss {losses[first]:.4f} (step {first})"
    last, before = others[-1], ([first, *others])[-2]
    steps = f"step {last}" if last == before + 1 else f"mean of steps {before + 1} to {last}"
    return f"Loss {losses[first]:.4f} (step {first}), then {losses[last]:.4f} ({steps})"
