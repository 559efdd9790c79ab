"""A conversation of several turns with a model, in which adapters can be exchanged."""

import re
from collections.abc import Callable
from pathlib import Path

import llama_adapter_kernels as lak
from llama_adapter_kernels.errors import UserError, text_problem
from llama_adapter_kernels.generate import Answerer, Sampling, attach_saved, text_streamer
from llama_adapter_kernels.integrations.choosing import attached_adapters, attachment_of
from llama_adapter_kernels.training.chats import Chat, Turn
from llama_adapter_kernels.training.run_folder import noted_template
from llama_adapter_kernels.training.templates import TemplateProblem, choose_template
from llama_adapter_kernels.training.tokens import dialogue_tokens

BASE = "none"  # what /adapter calls the model without one


class Conversation:
    """What was said so far, and who answers next.

    Args:
        answerer: the base model with its tokenizer; adapters are added by `use`.
        template: "auto": the one that the adapter in use was trained with, where its folder tells.
        system: what the conversation begins with, if anything.

    Attributes:
        turns: of the user and the assistant, in turn.
    """

    def __init__(
        self, answerer: Answerer, sampling: Sampling, template: str = "auto", system: str | None = None
    ) -> None:
        self.sampling, self.system = sampling, system
        self.turns: list[Turn] = []
        self._template = template
        self._noted: dict[str, str | None] = {}  # the template by the name of the adapter
        self._answerer = answerer

    @property
    def active(self) -> str | None:
        """The adapter that answers; None: the base model does."""
        if not self.adapters:
            return None
        name: str | None = attachment_of(self._answerer.model)[0].active
        return name

    @property
    def adapters(self) -> list[str]:
        """The names of the adapters that are loaded."""
        return list(attached_adapters(self._answerer.model))

    def say(self, text: str, stream: Callable[[str], None]) -> int:
        """The model answers piece by piece into `stream`.

        Returns:
            How many of the oldest exchanges were left out of what the model was given: its context has no room for them.

        Raises:
            UserError: it is no text, alone too long for the model, or the template cannot say it.
        """
        problem = text_problem(text)
        if problem is not None:
            raise UserError(problem)
        asked = [*self.turns, Turn("user", text)]
        left_out, tokens = 0, self._tokens(asked)
        room = min(self.sampling.max_new_tokens, self._answerer.context // 2)
        while len(tokens) + room > self._answerer.context and len(asked) > 1:
            asked, left_out = asked[2:], left_out + 1
            tokens = self._tokens(asked)
        streamer = text_streamer(self._answerer.tokenizer, stream)
        [answer] = self._answerer.continuations([tokens], self.sampling, streamer)
        said = self._answerer.tokenizer.decode(answer, skip_special_tokens=True).strip()
        self.turns += [Turn("user", text), Turn("assistant", said)]
        return left_out

    def reset(self) -> None:
        """Forgets everything but the system's turn."""
        self.turns = []

    def use(self, wanted: str) -> str:
        """Another adapter answers from now on: one that is loaded, one from a folder or the hub, or "none".

        Returns:
            The name that it has here.

        Raises:
            UserError: there is none of that name or in that place, or it does not fit the model.
        """
        model, name = self._answerer.model, wanted
        if wanted not in self.adapters and wanted != BASE:
            name = self._free_name(wanted)
            folder = attach_saved(model, Path(wanted), name)
            self._noted[name] = noted_template(folder)
        if self.adapters:
            lak.set_adapter(model, None if name == BASE else name, trainable=False)
        chosen = self._noted.get(name) if self._template == "auto" else None
        template = choose_template(chosen or self._template, self._answerer.tokenizer, [])
        self._answerer = Answerer(model, self._answerer.tokenizer, template)
        return name

    def _tokens(self, turns: list[Turn]) -> list[int]:
        first = [Turn("system", self.system)] if self.system else []
        try:
            return dialogue_tokens(Chat((*first, *turns)), self._answerer.tokenizer, self._answerer.template)
        except TemplateProblem as error:
            raise UserError(str(error)) from None

    def _free_name(self, place: str) -> str:
        """A name for the adapter in a folder: the folder's."""
        path = Path(place)
        name = re.sub(r"[^A-Za-z0-9_-]+", "-", (path.resolve() if path.exists() else path).name)[:90] or "adapter"
        taken, number = {*self.adapters, BASE}, 2
        free = name
        while free in taken:
            free, number = f"{name}-{number}", number + 1
        return free
