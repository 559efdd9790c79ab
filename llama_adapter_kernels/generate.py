"""Answers to instructions, with or without an adapter: one, a batch of different lengths, or streamed."""

import math
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import llama_adapter_kernels as lak
from llama_adapter_kernels import hub
from llama_adapter_kernels.errors import UserError
from llama_adapter_kernels.integrations.conditioning import ATTRIBUTE as CONDITIONING
from llama_adapter_kernels.integrations.conditioning import has_conditioning
from llama_adapter_kernels.models import (
    adapter_error_as_user_error,
    context_length,
    load_model,
    load_tokenizer,
    skeleton,
)
from llama_adapter_kernels.training.data import Row, read_rows
from llama_adapter_kernels.training.run_folder import noted_template
from llama_adapter_kernels.training.templates import Alpaca, Template, choose_template
from llama_adapter_kernels.training.tokens import prompt_tokens

_WINDOW = 16  # batches among which `answer_all` sorts by length
COLDEST = 1e-6  # logits divided by less than this may overflow


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. temperature 0: the most probable one; else from the `top_p` most probable mass."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"--max-new-tokens: expected at least 1, got {self.max_new_tokens}")
        if self.temperature != 0 and not COLDEST <= self.temperature < math.inf:  # false for NaN
            raise UserError(f"--temperature: expected 0 (greedy) or a number from {COLDEST}, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p: expected more than 0 and at most 1, got {self.top_p}")


class Answerer:
    """A model, its tokenizer and, where one is attached, its adapter."""

    def __init__(self, model: Any, tokenizer: Any, template: Template | None = None) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.template = template or Alpaca()
        self.context = context_length(model.config) or sys.maxsize
        ends = model.generation_config.eos_token_id
        ends = [ends] if isinstance(ends, int) else ends or []
        self.end_tokens = sorted({tokenizer.eos_token_id, *ends, *self.template.end_tokens()} - {None})
        if not self.end_tokens:
            raise UserError("neither model nor tokenizer has an end-of-sequence token: an answer would never end")

    def answer(self, rows: Sequence[Row], sampling: Sampling, stream: Callable[[str], None] | None = None) -> list[str]:
        """The answers to one batch; every one ends at its own end of sequence.

        Args:
            rows: instructions of any lengths; they are padded on the left. `output` is not looked at.
            stream: receives the pieces of text as they come; for a single row only.

        Raises:
            UserError: a prompt leaves no room in the model's context.
        """
        prompts = [prompt_tokens(row, self.tokenizer, self.template) for row in rows]
        streamer = None if stream is None else text_streamer(self.tokenizer, stream)
        with self._seeing(rows):
            answers = self.continuations(prompts, sampling, streamer)
        return [str(self.tokenizer.decode(tokens, skip_special_tokens=True)).strip() for tokens in answers]

    def _seeing(self, rows: Sequence[Row]) -> AbstractContextManager[None]:
        """The model sees the pictures, or hears the sounds, of the rows.

        Raises:
            UserError: a row has one and the adapter has no eyes or ears for it, or the file cannot be decoded.
        """
        if not any(row.media for row in rows):
            return nullcontext()
        conditioning: Any = getattr(self.model, CONDITIONING, None)
        for row in rows:
            kind = "image" if row.image else "audio"
            if row.media and (conditioning is None or conditioning.config.modality != kind):
                has = "no conditioning" if conditioning is None else f"one for {conditioning.config.modality}"
                raise UserError(f"{row.media}: expected an adapter with a conditioning for {kind}, this one has {has}")
        seeing: AbstractContextManager[None] = conditioning.seeing([row.media for row in rows])
        return seeing

    @torch.inference_mode()
    def continuations(self, prompts: Sequence[list[int]], sampling: Sampling, streamer: Any = None) -> list[list[int]]:
        """The tokens that follow each prompt, without the end of sequence."""
        longest = max(map(len, prompts))
        if longest >= self.context:
            raise UserError(f"the instruction has {longest} tokens, the model's context ends at {self.context}")
        input_ids, attention_mask = left_padded(prompts, self._padding_token)
        tokens = self.model.generate(
            input_ids=input_ids.to(self.model.device),
            attention_mask=attention_mask.to(self.model.device),
            generation_config=self._generation_config(sampling, self.context - longest),
            streamer=streamer,
        )
        return [self._until_end(row) for row in tokens[:, longest:].tolist()]

    def answer_all(
        self, rows: Sequence[Row], sampling: Sampling, batch_size: int
    ) -> Iterator[tuple[int, str | UserError]]:
        """(number of the row, its answer or the reason why there is none) for any number of rows, in their order.

        Similar lengths share a batch to save padding, among some batches' worth of rows: answers come while others are
        still to be computed.
        """
        for start in range(0, len(rows), _WINDOW * batch_size):
            window = range(start, min(start + _WINDOW * batch_size, len(rows)))
            lengths = {i: len(prompt_tokens(rows[i], self.tokenizer, self.template)) for i in window}
            answers: dict[int, str | UserError] = {
                i: UserError(f"the instruction has {length} tokens, the model's context ends at {self.context}")
                for i, length in lengths.items()
                if length >= self.context
            }
            order = sorted(lengths.keys() - answers.keys(), key=lambda i: (-lengths[i], i))
            for first in range(0, len(order), batch_size):
                numbers = order[first : first + batch_size]
                answers |= zip(numbers, self.answer([rows[i] for i in numbers], sampling), strict=True)
            yield from ((i, answers[i]) for i in window)

    @property
    def _padding_token(self) -> int:
        # Padding is masked away: which token it is makes no difference.
        padding = self.tokenizer.pad_token_id
        return self.end_tokens[0] if padding is None else int(padding)

    def _generation_config(self, sampling: Sampling, room: int) -> Any:
        from transformers import GenerationConfig

        sampled = sampling.temperature > 0
        return GenerationConfig(
            max_new_tokens=min(sampling.max_new_tokens, room),
            do_sample=sampled,
            temperature=sampling.temperature if sampled else 1.0,
            top_p=sampling.top_p if sampled else 1.0,
            top_k=0 if sampled else 50,
            num_beams=1,
            eos_token_id=self.end_tokens,
            pad_token_id=self._padding_token,
            bos_token_id=self.tokenizer.bos_token_id,
        )

    def _until_end(self, tokens: list[int]) -> list[int]:
        end = next((i for i, token in enumerate(tokens) if token in self.end_tokens), len(tokens))
        return tokens[:end]


def load_answerer(
    model: str, adapter: Path | None, dtype: torch.dtype, device: str, template: str = "auto"
) -> Answerer:
    """The base model, with the adapter in the folder `adapter` if there is one.

    Args:
        template: "auto": the one that the adapter was trained with, where its folder tells.

    Raises:
        UserError: there is no such model or adapter, or the adapter is for another model.
    """
    if adapter is not None:
        adapter = adapter_folder(adapter)
        with adapter_error_as_user_error(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter")  # it is a check alone
            lak.load_adapter(skeleton(model), adapter)  # before the weights are loaded, which may take minutes
    tokenizer = load_tokenizer(model)
    noted = noted_template(adapter) if adapter is not None and template == "auto" else None
    written = choose_template(noted or template, tokenizer, [])
    network = load_model(model, dtype)
    if adapter is not None:
        attach_saved(network, adapter)
    return Answerer(network.to(device), tokenizer, written)


def attach_saved(network: Any, adapter: Path, name: str = "default") -> Path:
    """Attaches a saved adapter, with its conditioning where it has one. Returns the folder that it was in.

    Raises:
        UserError: there is no such adapter, or it is for another model.
    """
    folder = adapter_folder(adapter)
    with adapter_error_as_user_error():
        lak.load_adapter(network, folder, name=name)
        if has_conditioning(folder):
            try:
                lak.load_conditioning(network, folder)
            except BaseException:  # a model has one conditioning: the adapter is of no use without its own
                lak.detach_adapter(network, name)
                raise
    return folder


def adapter_folder(adapter: Path) -> Path:
    """The folder of a saved adapter; of a name on the hub, where its files are then.

    Raises:
        UserError: there is none.
    """
    try:
        folder = hub.adapter_place(adapter)
    except FileNotFoundError as error:
        raise UserError(f"--adapter {error}") from error
    if not folder.is_dir():
        raise UserError(f"--adapter {adapter}: no such folder")
    return folder


def read_instructions(path: Path) -> list[Row]:
    """Rows of Alpaca JSON or JSONL (output not needed), or of a .txt file with one instruction a line.

    Raises:
        UserError: as `data.read_rows`.
    """
    if path.suffix != ".txt":
        return read_rows(path, need_output=False)
    try:
        rows = [Row(line.strip()) for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason})") from None
    if not rows:
        raise UserError(f"{path}: no instructions")
    return rows


def left_padded(prompts: Sequence[Sequence[int]], padding: int) -> tuple[Tensor, Tensor]:
    """(tokens, mask), both [batch, longest] int64; the mask is 0 on padding."""
    longest = max(map(len, prompts))
    tokens = torch.tensor([[padding] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return tokens, mask


def text_streamer(tokenizer: Any, receive: Callable[[str], None]) -> Any:
    """A streamer for transformers' `generate` that hands on the text of the answer, and a line end after it."""
    from transformers import TextStreamer

    class Pieces(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            receive(text + ("\n" if stream_end else ""))

    return Pieces(tokenizer, skip_prompt=True, skip_special_tokens=True)
