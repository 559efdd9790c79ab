"""`llama-adapter evaluate`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llama_adapter_kernels.commands import answering
from llama_adapter_kernels.errors import UserError

if TYPE_CHECKING:
    from llama_adapter_kernels.evaluation.task import Item, Options

Option = typer.Option


def evaluate(
    task: Annotated[str, typer.Argument(help="scienceqa, captions, music_qa, vqa or held_out.")],
    data: Annotated[Path, Option(help="The task's annotations: a file, or a folder for scienceqa and vqa.")],
    model: Annotated[str | None, Option(help="Base model: a local Hugging Face folder or a hub name.")] = None,
    adapter: Annotated[Path | None, Option(help="Folder of a saved adapter; without: the base model answers.")] = None,
    output: Annotated[Path, Option(help="Folder for predictions.jsonl and scores.jsonl.")] = Path("evaluation"),
    predictions: Annotated[Path | None, Option(help="Score these instead of asking a model.")] = None,
    media: Annotated[Path | None, Option(help="Folder of the images or audio files.")] = None,
    text_only: Annotated[bool, Option("--text-only", help="Show no image and play no audio.")] = False,
    split: Annotated[str, Option(help="Of tasks that have several.")] = "test",
    mode: Annotated[str, Option(help="correct, or paper: as the published scripts count.")] = "correct",
    bertscore_model: Annotated[str, Option(help="Folder or hub name, for music_qa.")] = "roberta-large",
    limit: Annotated[int | None, Option(help="The first items only.")] = None,
    batch_size: Annotated[int, Option(help="Items answered at a time.")] = 8,
    max_new_tokens: Annotated[int | None, Option(help="Tokens of an answer at most (default: the task's).")] = None,
    dtype: answering.Dtype = "auto",
    device: answering.Device = "auto",
    cpu: answering.Cpu = False,
) -> None:
    """Answer a benchmark and score the answers, beside the published numbers. Repeating the command goes on."""
    if (model is None) == (predictions is None):
        raise UserError("--model, --predictions: expected one of them, got " + ("none" if model is None else "both"))
    if adapter is not None and model is None:
        raise UserError("--adapter: expected --model beside it")
    if mode not in ("correct", "paper"):
        raise UserError(f"--mode: expected correct or paper, got {mode!r}")
    for name, number in (("--limit", limit), ("--batch-size", batch_size), ("--max-new-tokens", max_new_tokens)):
        if number is not None and number < 1:
            raise UserError(f"{name}: expected at least 1, got {number}")
    from llama_adapter_kernels.evaluation import run
    from llama_adapter_kernels.evaluation.predictions import read_predictions
    from llama_adapter_kernels.evaluation.task import Options
    from llama_adapter_kernels.evaluation.tasks import task_named

    chosen = task_named(task)
    options = Options(split, media, text_only or predictions is not None, mode, bertscore_model)
    items = chosen.read(data, options)[:limit]
    if not items:
        raise UserError(f"{data}: no items")
    if predictions is not None:
        answers = read_predictions(predictions, items)
    else:
        assert model is not None
        answers = _ask(
            task, items, options, model, adapter, output, batch_size, max_new_tokens or 0, dtype, device, cpu
        )
    scores = chosen.score(items, answers, options)
    run.write_scores(output, scores, options)
    from rich.console import Console

    console = Console()
    console.print(run.table(chosen, scores, f"{task}, {len(items):,} items, {mode} mode"))
    for note in dict.fromkeys(f"{score.name}: {score.note}" for score in scores if score.note):
        console.print(note, highlight=False, markup=False, soft_wrap=True)
    if predictions is None:
        console.print(f"Predictions and scores are in {output}", highlight=False, markup=False)


def _ask(
    task: str, items: "list[Item]", options: "Options", model: str, adapter: Path | None, output: Path,
    batch_size: int, max_new_tokens: int, dtype: str, device: str, cpu: bool,
) -> list[str]:  # fmt: skip
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    from llama_adapter_kernels.devices import chosen_device
    from llama_adapter_kernels.evaluation import run
    from llama_adapter_kernels.evaluation.predictions import Predictions
    from llama_adapter_kernels.evaluation.tasks import task_named
    from llama_adapter_kernels.generate import load_answerer
    from llama_adapter_kernels.models import pick_dtype

    place = chosen_device(device, cpu)
    chosen_dtype = pick_dtype(dtype, on_cpu=place.type == "cpu", training=False)
    facts = run.header(
        task_named(task), items, options, model, adapter, batch_size=batch_size, max_new_tokens=max_new_tokens,
        dtype=str(chosen_dtype),
    )  # fmt: skip
    kept = Predictions(output, facts)
    answerer = load_answerer(model, adapter, chosen_dtype, str(place))
    with Progress("answering", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()) as bar:
        total = bar.add_task("", total=len(items))
        return run.predict(
            task_named(task), items, answerer, kept, batch_size, max_new_tokens,
            lambda done: bar.update(total, completed=done),
        )  # fmt: skip
