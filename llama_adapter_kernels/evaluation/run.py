"""One evaluation: answers batch by batch, kept on disk, then the scores and a table beside published numbers."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from llama_adapter_kernels.errors import UserError
from llama_adapter_kernels.evaluation.held_out import response_losses
from llama_adapter_kernels.evaluation.predictions import Predictions
from llama_adapter_kernels.evaluation.task import Item, Options, Score, Task
from llama_adapter_kernels.generate import Answerer, Sampling

SCORES_FILE = "scores.jsonl"


def predict(
    task: Task, items: Sequence[Item], answerer: Answerer, predictions: Predictions, batch_size: int,
    max_new_tokens: int, progress: Callable[[int], None],
) -> list[str]:  # fmt: skip
    """The prediction of every item, greedy. Batches that `predictions` holds already are not computed again.

    The batches depend on the items alone, so that an evaluation that was interrupted ends with the very same answers.

    Args:
        progress: called after each batch with the number of items done.
    """
    done = 0
    for batch in batches(items, batch_size):
        if not all(items[number].id in predictions for number in batch):
            if task.name == "held_out":
                answers = list(response_losses(answerer.model, answerer.tokenizer, items, batch))
            else:
                asked = [items[number] for number in batch]
                rows = [replace(item.row, image=item.image, audio=item.audio) for item in asked]
                answers = answerer.answer(rows, Sampling(max_new_tokens or task.max_new_tokens))
            predictions.add({items[number].id: answer for number, answer in zip(batch, answers, strict=True)})
        done += len(batch)
        progress(done)
    return predictions.of(items)


def batches(items: Sequence[Item], size: int) -> Iterator[list[int]]:
    """Numbers of items of similar length; the longest first, so that too large a batch fails at once."""
    order = sorted(range(len(items)), key=lambda number: len(items[number].row.prompt), reverse=True)
    yield from (order[start : start + size] for start in range(0, len(order), size))


def header(
    task: Task, items: Sequence[Item], options: Options, model: str, adapter: Path | None, **more: Any
) -> dict[str, Any]:
    """What decides about predictions: the first line of their file."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(
            json.dumps([item.id, item.row.prompt, item.row.output, str(item.image), str(item.audio)]).encode()
        )
    return {
        "task": task.name, "model": model, "adapter": None if adapter is None else str(adapter), "items": len(items),
        "data": digest.hexdigest()[:16], "split": options.split, **more,
    }  # fmt: skip


def write_scores(folder: Path, scores: Sequence[Score], options: Options) -> None:
    """One JSON line a score, replacing those of an earlier evaluation.

    Raises:
        UserError: the folder cannot be written.
    """
    lines = [json.dumps({**asdict(score), "mode": options.mode}) for score in scores]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / SCORES_FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--output {folder}: {error.strerror}") from None


def table(task: Task, scores: Sequence[Score], title: str) -> Any:
    """A rich table: these scores first, then what others have published; in the same units."""
    from rich.markup import escape
    from rich.table import Table

    shown = Table(title=title)
    shown.add_column("")
    for score in scores:
        shown.add_column(f"{score.name}\n({score.count:,})", justify="right")
    digits = 3 if all(score.value is None or score.value < 2 for score in scores) else 2
    shown.add_row("this model", *("-" if score.value is None else f"{score.value:.{digits}f}" for score in scores))
    for row in task.published:
        values = (row.values.get(score.name) for score in scores)
        shown.add_row(escape(row.system), *("" if value is None else f"{value:.{digits}f}" for value in values))
    return shown
