"""Predictions on disk: one JSON line each, so that an interrupted evaluation goes on where it stopped."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llama_adapter_kernels.errors import UserError
from llama_adapter_kernels.evaluation.task import Item

FILE = "predictions.jsonl"


class Predictions:
    """The file OUTPUT/predictions.jsonl: a first line that says what was asked of whom, then {"id", "prediction"}.

    Raises:
        UserError: the folder holds predictions of another evaluation; both sides are named.
    """

    def __init__(self, folder: Path, header: Mapping[str, Any]) -> None:
        self.path = folder / FILE
        self._known: dict[str, str] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if self.path.exists() and (lines := _whole_lines(self.path)):
                self._check(lines[0], header)
                self._known = {line["id"]: line["prediction"] for line in lines[1:]}
                content = [header, *({"id": key, "prediction": value} for key, value in self._known.items())]
            else:
                content = [header]
            # Rewritten without the line that an interruption may have left half-written.
            self.path.write_text("".join(_line(entry) for entry in content), encoding="utf-8")
        except OSError as error:
            raise UserError(f"--output {folder}: {error.strerror}") from None

    def add(self, answers: Mapping[str, str]) -> None:
        """Appends the answers of one batch."""
        # Part of a batch may be known: it is answered as a whole again, with the same answers.
        new = {key: value for key, value in answers.items() if key not in self._known}
        self._known.update(new)
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write("".join(_line({"id": key, "prediction": value}) for key, value in new.items()))
        except OSError as error:
            raise UserError(f"{self.path}: {error.strerror}; the same command goes on from here later") from None

    def __contains__(self, identity: str) -> bool:
        return identity in self._known

    def of(self, items: Sequence[Item]) -> list[str]:
        return [self._known[item.id] for item in items]

    def _check(self, first: Mapping[str, Any], header: Mapping[str, Any]) -> None:
        different = [key for key in header if first.get(key) != header[key]]
        if different:
            theirs = ", ".join(f"{key} {first.get(key)}" for key in different)
            ours = ", ".join(f"{key} {header[key]}" for key in different)
            raise UserError(
                f"{self.path}: it holds predictions of {theirs}; asked for now: {ours}; expected another --output"
            )


def read_predictions(path: Path, items: Sequence[Item]) -> list[str]:
    """Predictions that somebody else made: our JSONL, {id: text}, or COCO's [{image_id, caption}].

    Raises:
        UserError: the file is of another form, or items have no prediction in it (or it has items we do not know).
    """
    from llama_adapter_kernels.evaluation.files import read_json

    content: Any
    if path.suffix == ".jsonl":
        found = {line["id"]: line["prediction"] for line in _whole_lines(path) if "id" in line and "prediction" in line}
    else:
        content = read_json(path)
        if isinstance(content, dict):  # ScienceQA's result files keep theirs under "results" or "outputs"
            content = content.get("outputs", content.get("results", content))
            found = {str(key): str(value) for key, value in content.items()}
        elif isinstance(content, list) and all(
            isinstance(e, dict) and {"image_id", "caption"} <= e.keys() for e in content
        ):
            found = {str(entry["image_id"]): str(entry["caption"]) for entry in content}
        else:
            raise UserError(f"{path}: expected JSONL, an object of predictions by id, or [{{image_id, caption}}]")
    missing = [item.id for item in items if item.id not in found]
    foreign = found.keys() - {item.id for item in items}
    if missing or foreign:
        examples = ", ".join([*missing[:2], *sorted(foreign)[:2]])
        raise UserError(
            f"{path}: expected predictions for the {len(items)} items of the data, {len(missing)} of them have none and "
            f"{len(foreign)} predictions are of other items (such as {examples})"
        )
    return [found[item.id] for item in items]


def _line(entry: Mapping[str, Any]) -> str:
    return json.dumps(entry, ensure_ascii=True) + "\n"


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """The parsed lines up to the first that was not written whole."""
    lines: list[dict[str, Any]] = []
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    for number, line in enumerate(text.split("\n")[:-1], 1):
        try:
            entry = json.loads(line)
        except ValueError:
            break
        if not isinstance(entry, dict):
            raise UserError(f"{path}, line {number}: expected an object, got {type(entry).__name__}")
        lines.append(entry)
    return lines
