"""Instruction data: Alpaca rows and chats from JSON or JSONL, told apart by their fields."""

import json
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_adapter_kernels.errors import UserError, text_problem
from llama_adapter_kernels.training.chats import Chat, chat_field, read_chat

log = logging.getLogger(__name__)

MEDIA = ("image", "audio")  # fields of a row with a path relative to the file of the row
SUFFIXES = (".json", ".jsonl", ".parquet")
_REPORTED_ROWS = 5  # of the skipped ones, by name; the rest are counted


@dataclass(frozen=True)
class Row:
    """One instruction; `input` and `output` may be empty. It may be about one picture or one sound."""

    instruction: str
    input: str = ""
    output: str = ""
    image: Path | None = None
    audio: Path | None = None

    @property
    def media(self) -> Path | None:
        """The file that the instruction is about."""
        return self.image or self.audio

    @property
    def prompt(self) -> str:
        """The Alpaca template, with which LLaMA-Adapter was trained. The response follows without a space."""
        with_input = ", paired with an input that provides further context" if self.input else ""
        context = f"### Input:\n{self.input}\n\n" if self.input else ""
        return (
            f"Below is an instruction that describes a task{with_input}. Write a response that appropriately completes "
            f"the request.\n\n### Instruction:\n{self.instruction}\n\n{context}### Response:"
        )


def read_rows(path: Path, *, skip_bad_rows: bool = False, need_output: bool = True) -> list[Row]:
    """Instruction rows of one file; otherwise as `read_conversations`."""
    found = _read_file(path, skip_bad_rows, need_output, chats=False)
    return [row for row in found if isinstance(row, Row)]


def read_conversations(
    paths: Sequence[Path], *, skip_bad_rows: bool = False, need_output: bool = True
) -> list[Row | Chat]:
    """Instruction rows and chats of files, and of the .json, .jsonl and .parquet files in folders.

    A file holds a JSON array or JSONL (one object a line), told apart by the first character, or is a Parquet file. All
    rows of a file have the same fields: "instruction", "messages" or "conversations".

    Args:
        skip_bad_rows: leave out rows that do not fit, with one warning for each file that counts and names them.
        need_output: a row without an answer does not fit (training); False for prompts to answer.

    Raises:
        UserError: a file cannot be read, has no rows, or a row does not fit: the message names file, line or row,
            field, and what was found.
    """
    return [row for file in files_of(paths) for row in _read_file(file, skip_bad_rows, need_output, chats=True)]


def files_of(paths: Sequence[Path]) -> list[Path]:
    """The files themselves, and those in folders that hold rows, in the order of their names.

    Raises:
        UserError: a folder has none.
    """
    files: list[Path] = []
    for path in paths:
        if not path.is_dir():
            files.append(path)
            continue
        found = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
        if not found:
            raise UserError(f"{path}: no file in this folder ends in {', '.join(SUFFIXES)}")
        files += found
    return files


def _read_file(path: Path, skip_bad_rows: bool, need_output: bool, chats: bool) -> list[Row | Chat]:
    rows: list[Row | Chat] = []
    bad: list[str] = []
    first: tuple[str | None, str] | None = None  # the field that makes a chat, and where
    for where, value in _values(path):
        field = chat_field(value) if chats else None
        found: Row | Chat | str
        if isinstance(value, _NoJson):
            found = str(value)
        elif first is not None and isinstance(value, dict) and field != first[0]:
            found = (
                f"expected {_format(first[0])} as in {first[1]}, got {_format(field)}: a file has rows of one format"
            )
        elif field is not None:
            found = _media_problem(value, path.parent) or read_chat(
                value, field, need_output, _media(value, path.parent)
            )
        else:
            found = _problem(value, need_output, path.parent) or _row(value, path.parent)
        if not isinstance(found, str):
            first = first or (field, where)
            rows.append(found)
        elif skip_bad_rows:
            bad.append(f"{where}: {found}")
        else:
            raise UserError(f"{path}, {where}: {found} (--skip-bad-rows leaves such rows out)")
    if bad:
        more = f"; and {len(bad) - _REPORTED_ROWS} more" if len(bad) > _REPORTED_ROWS else ""
        log.warning("%s: %d of %d rows left out: %s%s", path, len(bad), len(bad) + len(rows),
                    "; ".join(bad[:_REPORTED_ROWS]), more)  # fmt: skip
    if not rows:
        raise UserError(f"{path}: no rows" + (f" left, {len(bad)} do not fit" if bad else ""))
    return rows


def _row(value: dict[str, Any], folder: Path) -> Row:
    return Row(value["instruction"], value.get("input") or "", value.get("output") or "", **_media(value, folder))


def _media(value: dict[str, Any], folder: Path) -> dict[str, Path]:
    return {kind: folder / value[kind] for kind in MEDIA if value.get(kind)}


def _format(field: str | None) -> str:
    return 'an Alpaca row ("instruction")' if field is None else f'a chat ("{field}")'


def _values(path: Path) -> Iterator[tuple[str, Any]]:
    """("row 3" or "line 3", the value, or the _NoJson where a line does not parse)."""
    if path.suffix == ".parquet":
        return _parquet_values(path)
    try:
        return _json_values(path, path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{path}, line {line}: not UTF-8 text ({error.reason})") from None


def _parquet_values(path: Path) -> Iterator[tuple[str, Any]]:
    from pyarrow import ArrowException, parquet

    try:
        with parquet.ParquetFile(path) as file:
            batches = (row for batch in file.iter_batches() for row in batch.to_pylist())
            yield from ((f"row {number}", row) for number, row in enumerate(batches, 1))
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        said = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
        raise UserError(f"{path}: not a Parquet file that can be read: {said}") from None


def _json_values(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """("row 3" or "line 3", the parsed value, or the _NoJson where a line does not parse)."""
    if text.lstrip().startswith("["):
        values = _parse(text)
        if isinstance(values, _NoJson):
            raise UserError(f"{path}{values.place}: {values}")
        yield from ((f"row {number}", value) for number, value in enumerate(values, 1))
        return
    for number, line in enumerate(text.split("\n"), 1):  # splitlines() would also split at U+2028 inside a string
        if line.strip():
            yield f"line {number}", _parse(line)


class _NoJson(ValueError):
    """Why a text is no JSON; `place` is ", line 2, column 1" where the parser says so."""

    place = ""


def _parse(text: str) -> Any:
    """The value, or a _NoJson."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        problem = _NoJson(f"not valid JSON: {error.msg}")
        problem.place = f", line {error.lineno}, column {error.colno}"
    except RecursionError:
        problem = _NoJson("not valid JSON: nested too deeply")
    except ValueError:  # Python's limit, which keeps the parsing of a number from taking hours
        problem = _NoJson(f"not valid JSON: a number of more than {sys.get_int_max_str_digits()} digits")
    return problem


def _problem(value: Any, need_output: bool, folder: Path) -> str | None:
    """Why a parsed row does not fit; None when it does."""
    if not isinstance(value, dict):
        return f"expected an object with instruction, input and output, got {_kind(value)}"
    for field, required in (("instruction", True), ("input", False), ("output", need_output)):
        content = value.get(field)
        if content is None:
            if required:
                return f'field "{field}" is missing' if field not in value else f'field "{field}" is null'
        elif not isinstance(content, str):
            return f'field "{field}": expected text, got {_kind(content)}'
        elif (problem := text_problem(content)) is not None:
            return f'field "{field}": {problem}'
    if not value["instruction"].strip():
        return 'field "instruction" is empty'
    if need_output and not value["output"].strip():
        return 'field "output" is empty: an empty answer teaches nothing but to end'
    return _media_problem(value, folder)


def _media_problem(value: dict[str, Any], folder: Path) -> str | None:
    """Why the picture or sound of a row does not fit; whether it can be decoded shows when it is encoded."""
    given = [kind for kind in MEDIA if value.get(kind)]
    if len(given) > 1:
        return 'fields "image" and "audio": expected one of them, got both'
    for kind in given:
        if not isinstance(value[kind], str):
            return f'field "{kind}": expected a path as text, got {_kind(value[kind])}'
        if not (folder / value[kind]).is_file():
            return f'field "{kind}": no file {folder / value[kind]}'
    return None


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "an array", str: "text", bool: "true or false"} | dict.fromkeys(
        (int, float), "a number"
    )
    return names.get(type(value), "null")
