"""Held-out loss and perplexity: no generation, the model's own probability of the reference answers."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from llama_adapter_kernels.evaluation.task import Item, Options, Published, Score
from llama_adapter_kernels.training.data import read_rows
from llama_adapter_kernels.training.tokens import IGNORED_LABEL, Example, tokenize


class HeldOut:
    """`--data` is what fine-tuning takes: instructions with answers. A prediction is "loss sum, tokens" as text."""

    name = "held_out"
    max_new_tokens = 0
    published: tuple[Published, ...] = ()

    def read(self, data: Path, options: Options) -> list[Item]:
        return [Item(str(index), row, (row.output,)) for index, row in enumerate(read_rows(data))]

    def score(self, items: Sequence[Item], predictions: Sequence[str], options: Options) -> list[Score]:
        sums = [tuple(map(float, prediction.split())) for prediction in predictions]
        tokens = sum(count for _, count in sums)
        if tokens == 0:
            return [Score("loss", None, 0, "no response token fits into the model's context")]
        loss = sum(total for total, _ in sums) / tokens
        return [Score("loss", loss, int(tokens)), Score("perplexity", math.exp(min(loss, 700.0)), int(tokens))]


@torch.inference_mode()
def response_losses(model: Any, tokenizer: Any, items: Sequence[Item], batch: Sequence[int]) -> Iterator[str]:
    """For each number of `batch`: the sum of the cross entropies (nats) of its response tokens, and their count."""
    context = model.config.max_position_embeddings
    for example in tokenize([items[number].row for number in batch], tokenizer, context):
        yield " ".join(map(repr, _loss(model, example)))


def _loss(model: Any, example: Example) -> tuple[float, int]:
    labels = torch.tensor(example.labels[1:])
    live = labels != IGNORED_LABEL
    if not live.any():
        return 0.0, 0
    tokens = torch.tensor([example.tokens[:-1]], device=model.device)
    logits = model(input_ids=tokens, logits_to_keep=live.nonzero()[:, 0].to(model.device)).logits[0]
    target = labels[live].to(model.device)
    return float(functional.cross_entropy(logits.float(), target, reduction="sum")), int(live.sum())
