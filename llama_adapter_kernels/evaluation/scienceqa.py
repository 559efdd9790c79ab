"""ScienceQA (Lu et al., 2022): prompt QCM -> A without lectures, accuracy by subject, context, grade."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llama_adapter_kernels.errors import UserError
from llama_adapter_kernels.evaluation.files import field_of, media_file, read_json
from llama_adapter_kernels.evaluation.task import Item, Options, Published, Score
from llama_adapter_kernels.training.data import Row

LETTERS = "ABCDEFGHIJ"
SUBJECTS = {"natural science": "NAT", "social science": "SOC", "language science": "LAN"}
_NAMES = ("Avg", "NAT", "SOC", "LAN", "TXT", "IMG", "NO", "G1-6", "G7-12")
_PAPER = {
    "LLaMA-Adapter, text only [paper]": (78.31, 79.00, 73.79, 80.55, 78.30, 70.35, 83.14, 79.77, 75.68),
    "LLaMA-Adapter, multimodal [paper]": (85.19, 84.37, 88.30, 84.36, 83.72, 80.32, 86.90, 85.83, 84.05),
}
# "The answer is (B)." first, then any letter in brackets, then a letter that begins the answer.
_ANSWERS = (
    re.compile(r"answer\s*(?:is|:)\s*\(?([A-J])\b", re.IGNORECASE),
    re.compile(r"\(([A-J])\)"),
    re.compile(r"^\s*([A-J])(?:[.):\s]|$)"),
)


class ScienceQA:
    """`--data` is the folder of problems.json and pid_splits.json, with images in SPLIT/ID/image.png below it."""

    name = "scienceqa"
    max_new_tokens = 16
    published = tuple(Published(system, dict(zip(_NAMES, row, strict=True))) for system, row in _PAPER.items())

    def read(self, data: Path, options: Options) -> list[Item]:
        problems = read_json(data / "problems.json")
        splits = read_json(data / "pid_splits.json")
        captions = read_json(data / "captions.json") if (data / "captions.json").exists() else {}
        captions = captions.get("captions", captions)
        if options.split not in splits:
            raise UserError(f"{data / 'pid_splits.json'}: expected a split {options.split}, it has {', '.join(splits)}")
        items = []
        for number in splits[options.split]:
            if number not in problems:
                raise UserError(
                    f"{data}: pid_splits.json lists {number} in {options.split}, problems.json has no such question"
                )
            items.append(_item(number, problems[number], captions.get(number, ""), data, options))
        return items

    def score(self, items: Sequence[Item], predictions: Sequence[str], options: Options) -> list[Score]:
        right = [
            chosen_option(prediction, item.facts["choices"]) == item.facts["answer"]
            for item, prediction in zip(items, predictions, strict=True)
        ]
        unreadable = sum(chosen_option(p, i.facts["choices"]) is None for i, p in zip(items, predictions, strict=True))
        scores = []
        for name in _NAMES:
            inside = [
                good for good, item in zip(right, items, strict=True) if name == "Avg" or name in item.facts["groups"]
            ]
            note = f"{unreadable} answers name no option and count as wrong" if name == "Avg" and unreadable else ""
            value = 100.0 * sum(inside) / len(inside) if inside else None
            scores.append(Score(name, value, len(inside), note if inside else "no such question"))
        return scores


def chosen_option(prediction: str, choices: Sequence[str]) -> int | None:
    """The index of the option that an answer names, by letter or by its text; None where it names none that exists."""
    for pattern in _ANSWERS:
        found = pattern.search(prediction)
        if found and (index := LETTERS.index(found[1].upper())) < len(choices):
            return index
    text = prediction.strip().strip(".").casefold()
    matches = [index for index, choice in enumerate(choices) if choice.strip().strip(".").casefold() == text]
    return matches[0] if len(matches) == 1 else None


def instruction(question: str, context: str, choices: Sequence[str]) -> str:
    """The prompt QCM: question, context, multiple options."""
    options = " ".join(f"({LETTERS[i]}) {choice}" for i, choice in enumerate(choices))
    return f"Question: {question}\nContext: {context or 'N/A'}\nOptions: {options}"


def _item(number: str, problem: Any, caption: str, data: Path, options: Options) -> Item:
    where = f"{data / 'problems.json'}, question {number}"
    own_split = problem.get("split") if isinstance(problem, dict) else None
    if own_split not in (None, options.split):
        raise UserError(f"{where}: expected split {options.split} (pid_splits.json), the question says {own_split}")
    choices = field_of(problem, "choices", list, where)
    answer = field_of(problem, "answer", int, where)
    if not 0 <= answer < len(choices) <= len(LETTERS):
        raise UserError(f"{where}: expected an answer from 0 to {len(choices) - 1} of its choices, got {answer}")
    question, hint = field_of(problem, "question", str, where), problem.get("hint") or ""
    subject, grade = field_of(problem, "subject", str, where), field_of(problem, "grade", str, where)
    if subject not in SUBJECTS or not grade.removeprefix("grade").isdecimal():
        raise UserError(f"{where}: expected a subject of {', '.join(SUBJECTS)} and a grade, got {subject!r}, {grade!r}")
    picture = problem.get("image")
    groups = {SUBJECTS[subject], "G1-6" if int(grade.removeprefix("grade")) <= 6 else "G7-12"}
    groups |= ({"TXT"} if hint else set()) | ({"IMG"} if picture else set()) | (set() if hint or picture else {"NO"})
    image = None
    if picture and not options.text_only:
        image = media_file((options.media or data) / options.split / number / picture, where)
    context = " ".join(part for part in (hint.strip(), caption.strip()) if part)
    return Item(
        number, Row(instruction(question, context, choices), "", f"The answer is ({LETTERS[answer]})."),
        (f"The answer is ({LETTERS[answer]}).",), {"choices": choices, "answer": answer, "groups": groups}, image,
    )  # fmt: skip
