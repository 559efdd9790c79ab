"""`llama-adapter finetune`. Its options are the fields of Task, Settings and Execution in training/settings.py."""

import os
import shlex
import sys
from pathlib import Path
from typing import Any

import typer

from llama_adapter_kernels.commands.options import gathered, settle, takes
from llama_adapter_kernels.training.config_file import known_options
from llama_adapter_kernels.training.settings import Execution, Settings, Task

_EXCLUDING = (
    ("batch_size", "tokens_per_step"), ("micro_batch_size", "tokens_per_micro_batch"), ("eval_data", "eval_fraction"),
    ("image_encoder", "audio_encoder"), ("resume", "overwrite"), ("cpu", "device"),
)  # fmt: skip


@takes(Task, Settings, Execution)
def finetune(context: typer.Context, config: Path | None, **values: Any) -> None:
    """Fine-tune an adapter on instructions. The base model stays frozen and only the adapter is saved.

    Defaults are the paper's recipe. Several GPUs or processes:
    torchrun --nproc-per-node N -m llama_adapter_kernels finetune ...
    """
    settle(context, values, _EXCLUDING, {name: one.default for name, one in known_options().items()})
    from llama_adapter_kernels.training.finetune import run_task

    task = gathered(Task, values)
    outcome = run_task(task, gathered(Settings, values), gathered(Execution, values))
    if os.environ.get("RANK", "0") != "0":
        return
    if isinstance(outcome, str):
        typer.echo(outcome)
        return
    if not outcome.finished:
        again = [argument for argument in sys.argv[1:] if argument not in ("--resume", "--overwrite")]
        typer.echo(f"Stopped after step {outcome.step}; everything up to there is saved in {task.output}. Go on with:")
        typer.echo(f"  llama-adapter {shlex.join([*again, '--resume'])}")
        raise typer.Exit(130)
    if outcome.losses:
        typer.echo(_losses(outcome.losses))
    if outcome.best_step is not None and outcome.held_out_losses:
        best = min(outcome.held_out_losses.values())
        typer.echo(f"Held-out loss {best:.4f} at its best, after step {outcome.best_step}: that adapter is saved")
    typer.echo(f"{outcome.step} steps in {outcome.seconds:.0f} s. The adapter is saved in {task.output}. Try it with:")
    typer.echo(f"  llama-adapter chat --model {shlex.quote(task.model)} --adapter {shlex.quote(str(task.output))}")


def _losses(losses: dict[int, float]) -> str:
    """First and last logged loss; a logged loss is the mean over the steps since the one before."""
    first, *others = sorted(losses)
    if not others:
        return f"Loss {losses[first]:.4f} (step {first})"
    last, before = others[-1], ([first, *others])[-2]
    steps = f"step {last}" if last == before + 1 else f"mean of steps {before + 1} to {last}"
    return f"Loss {losses[first]:.4f} (step {first}), then {losses[last]:.4f} ({steps})"
