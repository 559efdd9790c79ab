"""Instruction data: Alpaca rows from JSON or JSONL, the prompt template, and tokens with loss labels."""

import json
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from llama_adapter_kernels.errors import UserError, text_problem

log = logging.getLogger(__name__)

MEDIA = ("image", "audio")  # fields of a row with a path relative to the file of the row
IGNORED_LABEL = -100  # torch's cross_entropy and transformers skip it
_REPORTED_ROWS = 5  # of the skipped ones, by name; the rest are counted


class Tokenizer(Protocol):
    """What is needed of a transformers tokenizer."""

    bos_token_id: int | None
    eos_token_id: int | None

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...


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


@dataclass(frozen=True)
class Example:
    """The tokens of a prompt and its response, bos and eos included; only `tokens[prompt_length:]` carry loss."""

    tokens: tuple[int, ...]
    prompt_length: int
    media: Path | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def labels(self) -> list[int]:
        return [IGNORED_LABEL] * self.prompt_length + list(self.tokens[self.prompt_length :])

    def without_labels(self) -> "Example":
        """The same tokens, contributing nothing."""
        return Example(self.tokens, len(self.tokens), self.media)


def read_rows(path: Path, *, skip_bad_rows: bool = False, need_output: bool = True) -> list[Row]:
    """Rows of a JSON array or of JSONL (one object a line), told apart by the first character.

    Args:
        skip_bad_rows: leave out rows that do not fit, with one warning that counts and names them.
        need_output: a row without `output` does not fit (training); False for prompts to answer.

    Raises:
        UserError: the file cannot be read, has no rows, or a row does not fit: the message names file, line or row,
            field, and what was found.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{path}, line {line}: not UTF-8 text ({error.reason})") from None
    rows: list[Row] = []
    bad: list[str] = []
    for where, value in _json_values(path, text):
        problem = str(value) if isinstance(value, _NoJson) else _problem(value, need_output, path.parent)
        if problem is None:
            media = {kind: path.parent / value[kind] for kind in MEDIA if value.get(kind)}
            rows.append(Row(value["instruction"], value.get("input") or "", value.get("output") or "", **media))
        elif skip_bad_rows:
            bad.append(f"{where}: {problem}")
        else:
            raise UserError(f"{path}, {where}: {problem} (--skip-bad-rows leaves such rows out)")
    if bad:
        more = f"; and {len(bad) - _REPORTED_ROWS} more" if len(bad) > _REPORTED_ROWS else ""
        log.warning("%s: %d of %d rows left out: %s%s", path, len(bad), len(bad) + len(rows),
                    "; ".join(bad[:_REPORTED_ROWS]), more)  # fmt: skip
    if not rows:
        raise UserError(f"{path}: no rows" + (f" left, {len(bad)} do not fit" if bad else ""))
    return rows


def tokenize(rows: Sequence[Row], tokenizer: Tokenizer, max_length: int) -> list[Example]:
    """Rows as tokens of at most `max_length`, with one warning that counts the truncated ones.

    A truncated example keeps its eos. Where not even one token of the response fits nothing is learned from it.

    Raises:
        UserError: the tokenizer has no end-of-sequence token.
    """
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no end-of-sequence token (eos_token): a response would never end")
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    examples: list[Example] = []
    truncated = silent = 0
    for row in rows:
        prompt = begin + tokenizer.encode(row.prompt, add_special_tokens=False)
        tokens = begin + tokenizer.encode(row.prompt + row.output, add_special_tokens=False)
        if tokens[: len(prompt)] != prompt:  # a token such as ":'": no prompt that generation sees
            tokens = prompt + _continuation(row.output, tokenizer)
        example = Example((*tokens, tokenizer.eos_token_id), len(prompt), row.media)
        if len(example) > max_length:
            truncated += 1
            example = Example((*tokens[: max_length - 1], tokenizer.eos_token_id), len(prompt), row.media)
            if len(prompt) >= max_length - 1:
                silent += 1
                example = example.without_labels()
        examples.append(example)
    if truncated:
        log.warning(
            "%d of %d examples are longer than %d tokens and were truncated%s",
            truncated, len(examples), max_length,
            f"; {silent} of them have no room for a response and teach nothing" if silent else "",
        )  # fmt: skip
    return examples


def prompt_tokens(row: Row, tokenizer: Tokenizer) -> list[int]:
    """What a model is given to answer `row`, as in training."""
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return begin + tokenizer.encode(row.prompt, add_special_tokens=False)


def _continuation(text: str, tokenizer: Tokenizer) -> list[int]:
    """Tokens of `text` inside a longer text: SentencePiece would put a space before the first word of its own text."""
    line_end = tokenizer.encode("\n", add_special_tokens=False)
    both = tokenizer.encode("\n" + text, add_special_tokens=False)
    if both[: len(line_end)] == line_end:
        return both[len(line_end) :]
    return tokenizer.encode(text, add_special_tokens=False)


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
