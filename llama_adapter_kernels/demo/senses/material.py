"""What both demos share: things to look at or listen to, and questions with one right answer each."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_adapter_kernels.training.data import Row


@dataclass(frozen=True)
class Thing:
    """One picture or sound.

    Args:
        path: of the file.
        truth: what it shows, such as (7,) or ("violin", True, False).
    """

    path: Path
    truth: tuple[Any, ...]


@dataclass(frozen=True)
class Question:
    """A question about a thing.

    Args:
        text: as it is asked.
        answer: from the truth to the right answer.
    """

    text: str
    answer: Callable[[tuple[Any, ...]], str]


@dataclass(frozen=True)
class Material:
    """Everything a demo is about.

    Args:
        kind: "image" or "audio".
        title: of the report.
        training, held_out: the things.
        questions: asked about every thing.
        blank: a file that shows or plays nothing.
        encoder: a folder, or "log-mel".
        about_the_encoder: one sentence for the report.
        conditioning: the kind of module, and its sizes.
    """

    kind: str
    title: str
    training: Sequence[Thing]
    held_out: Sequence[Thing]
    questions: Sequence[Question]
    blank: Path
    encoder: str
    about_the_encoder: str
    conditioning: str
    sizes: tuple[tuple[str, int], ...]

    def row(self, thing: Thing, question: Question, shown: Path | None = None) -> Row:
        """The question about a thing, with `shown` in place of it where that is given."""
        path = thing.path if shown is None else shown
        media = {self.kind: path}
        return Row(question.text, "", question.answer(thing.truth), media.get("image"), media.get("audio"))

    def chance(self, question: Question) -> float:
        """The share of held-out things that the best constant answer is right about."""
        answers = [question.answer(thing.truth) for thing in self.held_out]
        return max(map(answers.count, answers)) / len(answers)
