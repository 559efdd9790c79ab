"""What the demo measures: the held-out loss, and a training step beside other ways to compute the same attention."""

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from llama_adapter_kernels.bench.cases import BenchCase, ModelShape
from llama_adapter_kernels.bench.measure import Budget, CpuClock
from llama_adapter_kernels.bench.runner import run_race
from llama_adapter_kernels.bench.workload import make_workload
from llama_adapter_kernels.training.loss import response_loss
from llama_adapter_kernels.training.packing import pack
from llama_adapter_kernels.training.tokens import Example

_BATCH_TOKENS = 4096  # of a packed evaluation batch, more or less
TIMED_SHAPE = (8, 256)  # sequences, tokens
BUDGET = Budget(seconds=5.0, least_rounds=5, most_rounds=15)
# Contestants of `llama-adapter bench`, this package first, as the report names them.
CONTESTANTS = {"ours-adapter": "fused (this package)", "two-sdpa": "two scaled_dot_product_attention calls",
               "eager": "eager", "peft": "PEFT AdaptionPrompt"}  # fmt: skip


@torch.no_grad()
def held_out_loss(model: nn.Module, examples: Sequence[Example]) -> float:
    """Mean cross-entropy over all response tokens of the examples, in nats per token."""
    training = model.training
    model.eval()
    total, count = 0.0, 0
    for batch in _batches(examples):
        loss, tokens = response_loss(model, pack(batch))
        total, count = total + loss.item(), count + tokens
    model.train(training)
    return total / count


def step_times(model: nn.Module) -> dict[str, float]:
    """Median seconds of a training step (forward, backward, optimizer) for each way to compute the attention, by label.

    `llama-adapter bench` times a model of the same shape with an adapter in every layer: the contestants are checked
    against each other and take turns. One that cannot run here is left out.
    """
    config, (batch, sequence) = model.config, TIMED_SHAPE
    shape = ModelShape(
        hidden=config.hidden_size, heads_q=config.num_attention_heads, heads_kv=config.num_key_value_heads,
        head_dim=config.head_dim, layers=config.num_hidden_layers, batch=batch, sequence=sequence,
        vocabulary=config.vocab_size, feed_forward=config.intermediate_size,
    )  # fmt: skip
    case = BenchCase("demo", "Training step of the demo's model", "training", model=shape)
    workload = make_workload(case, "step", "float32", torch.device("cpu"))
    by_name = {peer.name: peer for peer in workload.peers}
    found = run_race(workload, [by_name[name] for name in CONTESTANTS], BUDGET, CpuClock())
    return {CONTESTANTS[entry.peer]: entry.median for entry in found if entry.median is not None}


def _batches(examples: Sequence[Example]) -> Iterator[list[Example]]:
    batch: list[Example] = []
    for example in examples:
        if batch and sum(len(other) for other in batch) + len(example) > _BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(example)
    yield batch
