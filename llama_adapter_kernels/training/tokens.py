"""Conversations as tokens, with the positions that carry loss."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from llama_adapter_kernels.errors import UserError
from llama_adapter_kernels.training.chats import Chat
from llama_adapter_kernels.training.data import Row
from llama_adapter_kernels.training.templates import Alpaca, Pieces, Template, TemplateProblem

log = logging.getLogger(__name__)

IGNORED_LABEL = -100  # torch's cross_entropy and transformers skip it


class Tokenizer(Protocol):
    """What is needed of a transformers tokenizer."""

    bos_token_id: int | None
    eos_token_id: int | None

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...


@dataclass(frozen=True)
class Example:
    """The tokens of a conversation; what follows `prompt_length` carries loss, but for the stretches that are `given`.

    Args:
        given: (begin, end) of later turns that are not the model's own.
        media: the picture or sound that it is about.
    """

    tokens: tuple[int, ...]
    prompt_length: int
    media: Path | None = None
    given: tuple[tuple[int, int], ...] = ()

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def labels(self) -> list[int]:
        labels = [IGNORED_LABEL] * self.prompt_length + list(self.tokens[self.prompt_length :])
        for begin, end in self.given:
            labels[begin:end] = [IGNORED_LABEL] * (end - begin)
        return labels

    def without_labels(self) -> "Example":
        """The same tokens, contributing nothing."""
        return Example(self.tokens, len(self.tokens), self.media)


def tokenize(
    rows: Sequence[Row | Chat], tokenizer: Tokenizer, max_length: int, template: Template | None = None
) -> list[Example]:
    """Conversations as tokens of at most `max_length`, with one warning that counts the truncated ones.

    A truncated example keeps its last token, which ends the answer; where it would end within a turn of the user, that
    turn goes too. Where not even one token of an answer fits nothing is learned from it.

    Args:
        template: None: Alpaca's.

    Raises:
        UserError: the tokenizer has no end-of-sequence token, or the template cannot say a conversation.
    """
    template = template or Alpaca()
    if tokenizer.eos_token_id is None and template.ends:
        raise UserError("the tokenizer has no end-of-sequence token (eos_token): a response would never end")
    examples: list[Example] = []
    truncated = silent = 0
    for number, row in enumerate(rows, 1):
        try:
            example = _tokens_of(template.pieces(row), tokenizer, template, row.media)
        except TemplateProblem as error:
            raise UserError(f"example {number}: {error}") from None
        if len(example) > max_length:
            truncated += 1
            example = _truncated(example, max_length)
            if example.prompt_length >= len(example):
                silent += 1
        examples.append(example)
    if truncated:
        log.warning(
            "%d of %d examples are longer than %d tokens and were truncated%s",
            truncated, len(examples), max_length,
            f"; {silent} of them have no room for a response and teach nothing" if silent else "",
        )  # fmt: skip
    return examples


def prompt_tokens(row: Row | Chat, tokenizer: Tokenizer, template: Template | None = None) -> list[int]:
    """What a model is given to answer `row`, as in training."""
    template = template or Alpaca()
    return _begin(tokenizer, template) + tokenizer.encode(template.prompt(row), add_special_tokens=False)


def dialogue_tokens(chat: Chat, tokenizer: Tokenizer, template: Template) -> list[int]:
    """What a model is given to answer the last turn of a chat, of any number of turns."""
    return _begin(tokenizer, template) + tokenizer.encode(template.dialogue(chat), add_special_tokens=False)


def _begin(tokenizer: Tokenizer, template: Template) -> list[int]:
    return [tokenizer.bos_token_id] if template.begins and tokenizer.bos_token_id is not None else []


def _tokens_of(pieces: Pieces, tokenizer: Tokenizer, template: Template, media: Path | None) -> Example:
    (prompt_text, _), (answer, _), *later = pieces
    begin = _begin(tokenizer, template)
    prompt = begin + tokenizer.encode(prompt_text, add_special_tokens=False)
    tokens = begin + tokenizer.encode(prompt_text + answer, add_special_tokens=False)
    if tokens[: len(prompt)] != prompt:  # a token such as ":'": no prompt that generation sees
        tokens = prompt + _continuation(answer, tokenizer)
    given: list[tuple[int, int]] = []
    for text, learned in later:
        following = _continuation(text, tokenizer)
        if not learned:
            given.append((len(tokens), len(tokens) + len(following)))
        tokens += following
    if template.ends and tokenizer.eos_token_id is not None:
        tokens.append(tokenizer.eos_token_id)
    return Example(tuple(tokens), len(prompt), media, tuple(given))


def _truncated(example: Example, max_length: int) -> Example:
    end = example.tokens[-1]
    cut = next((begin for begin, stop in example.given if begin < max_length <= stop), None)
    if cut is not None:  # the answer before that turn ends where it ended
        tokens = example.tokens[:cut]
    else:
        tokens = (*example.tokens[: max_length - 1], end)
    given = tuple(stretch for stretch in example.given if stretch[1] <= len(tokens))
    if example.prompt_length >= len(tokens) - 1:
        return Example(tokens, len(tokens), example.media)
    return Example(tokens, example.prompt_length, example.media, given)


def _continuation(text: str, tokenizer: Tokenizer) -> list[int]:
    """Tokens of `text` inside a longer text: SentencePiece would put a space before the first word of its own text."""
    line_end = tokenizer.encode("\n", add_special_tokens=False)
    both = tokenizer.encode("\n" + text, add_special_tokens=False)
    if both[: len(line_end)] == line_end:
        return both[len(line_end) :]
    return tokenizer.encode(text, add_special_tokens=False)
