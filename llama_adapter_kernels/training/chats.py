"""Conversations of several turns: rows with "messages" (role, content) or, as in ShareGPT, "conversations" (from, value)."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from llama_adapter_kernels.errors import text_problem

# Field of the row -> (field of the speaker, field of the text) in a turn.
FIELDS = {"messages": ("role", "content"), "conversations": ("from", "value")}
ROLES = {
    "system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
    "chatgpt": "assistant", "model": "assistant", "bot": "assistant",
}  # fmt: skip


class Turn(NamedTuple):
    """What one speaker says; `role` is system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True)
class Chat:
    """A system's turn or none, then the user's and the assistant's. For training, the last one is the assistant's.

    It may be about one picture or one sound.
    """

    turns: tuple[Turn, ...]
    image: Path | None = None
    audio: Path | None = None

    @property
    def media(self) -> Path | None:
        """The file that the chat is about."""
        return self.image or self.audio


def chat_field(value: Any) -> str | None:
    """The field that makes a parsed row a conversation; None where it is not one."""
    return next((field for field in FIELDS if isinstance(value, dict) and field in value), None)


def read_chat(
    value: dict[str, Any], field: str, need_answer: bool, media: Mapping[str, Path] | None = None
) -> Chat | str:
    """The conversation in a parsed row, or why it does not fit.

    Args:
        media: "image" or "audio" and its file. Placeholders such as LLaVA's "<image>" are left out of the text then: the
            model sees the picture through its prompts, not in a place of the text.
        need_answer: for training; what follows the last turn of the assistant is left out then.
    """
    content = value[field]
    if not isinstance(content, list):
        return f'field "{field}": expected an array of turns'
    speaker, text = FIELDS[field]
    turns: list[Turn] = []
    for number, turn in enumerate(content, 1):
        where = f'field "{field}", turn {number}'
        if not isinstance(turn, dict) or not isinstance(turn.get(speaker), str) or not isinstance(turn.get(text), str):
            return f'{where}: expected an object with "{speaker}" and "{text}", both text'
        said = turn[text]
        for kind in media or {}:
            said = re.sub(rf"\s*<{kind}>\s*", "\n", said).strip("\n")
        role = ROLES.get(turn[speaker].lower())
        if role is None:
            return f'{where}: "{speaker}": expected one of {", ".join(ROLES)}; got {turn[speaker][:50]!r}'
        if (problem := text_problem(said)) is not None:
            return f"{where}: {problem}"
        if not said.strip():
            return f"{where}: the {'answer' if role == 'assistant' else 'text'} is empty"
        if role == "system" and number > 1:
            return f"{where}: expected the system's turn first"
        turns.append(Turn(role, said))
    if need_answer:
        while turns and turns[-1].role != "assistant":
            turns.pop()
        if not turns:
            return f'field "{field}": no turn of the assistant, there is nothing to learn'
    if next((turn.role for turn in turns if turn.role != "system"), "assistant") == "assistant":
        return f'field "{field}": expected a turn of the user first'
    return Chat(tuple(turns), **(media or {}))
