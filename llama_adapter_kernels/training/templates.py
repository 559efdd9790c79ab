"""From conversations to text: by the Alpaca template, which LLaMA-Adapter was trained with, or the tokenizer's own."""

from collections.abc import Sequence
from typing import Any, Protocol

from llama_adapter_kernels.errors import UserError
from llama_adapter_kernels.training.chats import Chat, Turn
from llama_adapter_kernels.training.data import Row

Pieces = list[tuple[str, bool]]  # texts that follow each other, and whether the model learns them


class TemplateProblem(ValueError):
    """Why a template cannot say a conversation; the caller knows which one it is."""


class Template(Protocol):
    """One way to write a conversation down.

    Attributes:
        begins: the beginning-of-sequence token is not part of the text and comes before it.
        ends: the end-of-sequence token is not part of the text and follows the last answer.
    """

    name: str
    begins: bool
    ends: bool

    def prompt(self, conversation: Row | Chat) -> str:
        """What a model is given to answer the conversation."""

    def dialogue(self, chat: Chat) -> str:
        """What a model is given to answer the last turn of a chat of any number of turns, the user's."""

    def pieces(self, conversation: Row | Chat) -> Pieces:
        """The whole text of a conversation that ends with an answer."""

    def end_tokens(self) -> list[int]:
        """Tokens that end an answer, besides those that model and tokenizer name."""


class Alpaca:
    """An instruction with or without input. The response follows without a space."""

    name, begins, ends = "alpaca", True, True

    def prompt(self, conversation: Row | Chat) -> str:
        return _as_row(conversation).prompt

    def dialogue(self, chat: Chat) -> str:
        """Instructions and responses follow each other, though nothing but the first of them was ever trained on."""
        system = [turn for turn in chat.turns if turn.role == "system"]
        first, *later = [turn for turn in chat.turns if turn.role != "system"]
        text = _as_row(Chat((*system, first))).prompt
        for turn in later:
            asked = f"\n\n### Instruction:\n{turn.content}\n\n### Response:"
            text += asked if turn.role == "user" else turn.content
        return text

    def pieces(self, conversation: Row | Chat) -> Pieces:
        row = _as_row(conversation)
        return [(row.prompt, False), (row.output, True)]

    def end_tokens(self) -> list[int]:
        return []


class ChatTemplate:
    """What the tokenizer brings along. Every answer is learned, with the token that ends it."""

    name, begins = "chat", False

    def __init__(self, tokenizer: Any) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise UserError("--template chat: this tokenizer has no chat template; --template alpaca needs none")
        self._tokenizer = tokenizer
        first, second = Turn("user", "a"), Turn("assistant", "b")
        prompt, whole = self._render([first], True), self._render([first, second])
        self._end = whole[len(prompt) :].strip().removeprefix("b").strip() if whole.startswith(prompt) else ""
        self.ends = not self._end

    def prompt(self, conversation: Row | Chat) -> str:
        chat = _as_chat(conversation)
        turns = chat.turns[:-1] if chat.turns[-1].role == "assistant" else chat.turns
        return self._render(list(turns), True)

    def dialogue(self, chat: Chat) -> str:
        return self._render(list(chat.turns), True)

    def pieces(self, conversation: Row | Chat) -> Pieces:
        turns = list(_as_chat(conversation).turns)
        pieces: Pieces = []
        said = ""
        for number, turn in enumerate(turns):
            if turn.role != "assistant":
                continue
            prompt, whole = self._render(turns[:number], True), self._render(turns[: number + 1])
            if not prompt.startswith(said) or not whole.startswith(prompt):
                raise TemplateProblem(
                    "the tokenizer's chat template writes earlier turns differently when later ones come"
                )
            answer = whole[len(prompt) :].rstrip()  # a line end after the end token is no part of the answer
            pieces += [(prompt[len(said) :], False), (answer, True)]
            said = prompt + answer
        return pieces

    def end_tokens(self) -> list[int]:
        return self._tokenizer.encode(self._end, add_special_tokens=False)[:1] if self._end else []

    def _render(self, turns: list[Turn], answer_next: bool = False) -> str:
        messages = [turn._asdict() for turn in turns]
        try:
            text: str = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer_next)
        # Broad on purpose: a template is a program of the tokenizer's author, and raises what it likes about roles.
        except Exception as error:
            said = " ".join(str(error).split())[:200]
            raise TemplateProblem(f"the tokenizer's chat template refuses it: {said}") from error
        return text


def choose_template(name: str, tokenizer: Any, conversations: Sequence[Row | Chat]) -> Template:
    """The template of that name; auto: the tokenizer's where there are chats, else Alpaca's.

    Raises:
        UserError: the tokenizer lacks it.
    """
    if name == "chat" or (name == "auto" and any(isinstance(one, Chat) for one in conversations)):
        return ChatTemplate(tokenizer)
    return Alpaca()


def _as_row(conversation: Row | Chat) -> Row:
    if isinstance(conversation, Row):
        return conversation
    *system, user = [turn.content for turn in conversation.turns if turn.role != "assistant"]
    answers = [turn.content for turn in conversation.turns if turn.role == "assistant"]
    roles = [turn.role for turn in conversation.turns if turn.role != "system"]
    if roles not in (["user"], ["user", "assistant"]):
        raise TemplateProblem(
            f"--template alpaca has one instruction and one answer, the chat has {len(roles)} turns; expected --template "
            "chat"
        )
    instruction, output = "\n\n".join([*system, user]), answers[0] if answers else ""
    return Row(instruction, "", output, conversation.image, conversation.audio)


def _as_chat(conversation: Row | Chat) -> Chat:
    if isinstance(conversation, Chat):
        return conversation
    asked = Turn("user", "\n\n".join(filter(None, (conversation.instruction, conversation.input))))
    turns = (asked, Turn("assistant", conversation.output)) if conversation.output else (asked,)
    return Chat(turns, conversation.image, conversation.audio)
