"""What a task is: items to answer, references to compare with, scores, and the numbers others have published."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from llama_adapter_kernels.training.data import Row


@dataclass(frozen=True)
class Item:
    """One thing to answer.

    Args:
        id: unique within the task; predictions are stored under it.
        row: what the model is asked.
        references: the right answers (several for captions and VQA).
        facts: what the scores are broken down by, task by task.
        image, audio: the file that the question is about.
    """

    id: str
    row: Row
    references: tuple[str, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)
    image: Path | None = None
    audio: Path | None = None


@dataclass(frozen=True)
class Options:
    """How a task is read and scored.

    Args:
        split: the part of the data, for tasks that have several.
        media: the folder of images or audio files; None: where the task keeps them beside its annotations.
        text_only: leave images out, as the paper's text-only model does.
        mode: "correct", or "paper" for scores with the quirks of the published scripts.
        bertscore_model: a local folder or hub name for BERTScore.
    """

    split: str = "test"
    media: Path | None = None
    text_only: bool = False
    mode: str = "correct"
    bertscore_model: str = "roberta-large"


@dataclass(frozen=True)
class Score:
    """One number of a table; `value` is None where it could not be computed, and `note` says why."""

    name: str
    value: float | None
    count: int
    note: str = ""


@dataclass(frozen=True)
class Published:
    """A row of somebody else's numbers, by the names of our scores, in the same units."""

    system: str
    values: Mapping[str, float]


class Task(Protocol):
    """One benchmark. `read` raises UserError for data that does not fit."""

    @property
    def name(self) -> str: ...

    @property
    def max_new_tokens(self) -> int: ...

    @property
    def published(self) -> Sequence[Published]: ...

    def read(self, data: Path, options: Options) -> list[Item]: ...

    def score(self, items: Sequence[Item], predictions: Sequence[str], options: Options) -> list[Score]: ...
