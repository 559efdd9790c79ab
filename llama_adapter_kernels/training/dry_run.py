"""A fine-tuning run before it begins: what it will do, the memory and the time that it will take. Nothing is written."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from llama_adapter_kernels.training.loop import compiled, device_of, plan_steps
from llama_adapter_kernels.training.memory import (
    MemoryEstimate,
    estimate_memory,
    fitting_tokens,
    layers_with_gradients,
    recompute,
)
from llama_adapter_kernels.training.packing import StepPlan, pack
from llama_adapter_kernels.training.settings import Execution, Settings
from llama_adapter_kernels.training.tokens import Example


@dataclass(frozen=True)
class Packing:
    """How the steps of a run are dealt out.

    Attributes:
        micro_batches: of a step, over all processes.
        tokens: of all steps together.
        largest: tokens of the largest micro-batch.
        step_fill: tokens of all steps but the last over the budget for a step; None: steps are so many examples.
        even: tokens of the average micro-batch over those of the largest.
    """

    micro_batches: int
    tokens: int
    largest: int
    step_fill: float | None
    even: float


def rehearse(
    network: Any,
    examples: Sequence[Example],
    held_out: Sequence[Example],
    settings: Settings,
    execution: Execution,
) -> str:
    """What a run will be, in words. One micro-batch of it is computed, twice, for the time that it takes."""
    plan = plan_steps(examples, settings)
    device, processes = device_of(execution), int(os.environ.get("WORLD_SIZE", "1"))
    layers = len(layers_with_gradients(network))
    capacity = execution.tokens_per_micro_batch or max(
        fitting_tokens(network, layers, device, low=execution.low_memory), plan.longest
    )
    packing = packing_of(plan, settings, execution, capacity, processes)
    memory = estimate_memory(network, layers, packing.largest, device, low=execution.low_memory)
    if execution.shard:
        memory = replace(memory, weights=memory.weights // processes)
    seconds, timed = seconds_per_micro_batch(network, examples, plan, packing, settings, execution, device)
    total = seconds / timed * packing.tokens / processes
    responses = sum(len(example) - example.prompt_length for example in examples)
    lines = [
        f"data      {len(examples):,} examples, {sum(map(len, examples)):,} tokens, {responses:,} of them in responses, "
        f"the longest example {plan.longest:,}; {len(held_out):,} examples held out",
        f"steps     {plan.total_steps:,} of {plan.examples_per_step:.4g} examples, {packing.tokens / plan.total_steps:,.0f} "
        f"tokens on average; {plan.total_steps / plan.steps_per_epoch:.3g} epochs",
        _packing_line(packing, settings, processes),
        _memory_line(memory, device),
        f"time      {duration(total)}, from one micro-batch of {timed:,} tokens in {seconds:.2f} s on {device}: "
        f"{timed / seconds * processes:,.0f} tokens/s; held-out losses and checkpoints come on top",
        f"trainable {sum(p.numel() for p in network.parameters() if p.requires_grad):,} of "
        f"{sum(p.numel() for p in network.parameters()):,} parameters",
    ]
    return "\n".join(lines)


def packing_of(plan: StepPlan, settings: Settings, execution: Execution, capacity: int, processes: int) -> Packing:
    """How the steps are dealt out into micro-batches of at most `capacity` tokens, or of so many examples on average."""
    if execution.micro_batch_size is not None:
        micro_batches = processes * -(-int(plan.examples_per_step) // (execution.micro_batch_size * processes))
    else:
        micro_batches = plan.micro_batches(capacity, processes)
    steps = [plan.tokens(plan.step(number)) for number in range(plan.total_steps)]
    hands = [plan.tokens(hand) for number in range(plan.total_steps) for hand in plan.hands(number, micro_batches)]
    full = steps[:-1] or steps
    budget = settings.tokens_per_step
    fill = None if budget is None else sum(full) / (len(full) * budget)
    return Packing(micro_batches, sum(steps), max(hands), fill, sum(hands) / (len(hands) * max(hands)))


def seconds_per_micro_batch(
    network: Any, examples: Sequence[Example], plan: StepPlan, packing: Packing, settings: Settings,
    execution: Execution, device: Any,
) -> tuple[float, int]:  # fmt: skip
    """(seconds of both passes, tokens) of the first micro-batch, computed twice: at first it warms up, or compiles."""
    import torch

    from llama_adapter_kernels.training.loss import response_loss

    chosen = next(hand for hand in plan.hands(0, packing.micro_batches) if hand)
    network.to(device).train()
    if execution.low_memory:
        recompute(network)
    longest = compiled(network, plan.longest) if execution.compile else None
    batch = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in pack([examples[i] for i in chosen], longest).items()
    }
    seconds = 0.0
    for _ in range(2):
        begin = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.autocast):
            loss, _ = response_loss(network, batch)
        loss.backward()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        seconds = time.perf_counter() - begin
    network.zero_grad(set_to_none=True)
    return seconds, plan.tokens(chosen)


def _packing_line(packing: Packing, settings: Settings, processes: int) -> str:
    shared = f" over {processes} processes" if processes > 1 else ""
    line = f"packing   {packing.micro_batches} micro-batches a step{shared}, the largest of {packing.largest:,} tokens"
    if packing.step_fill is not None:
        line += f"; steps are {100 * packing.step_fill:.1f}% of the {settings.tokens_per_step:,} tokens asked for"
    return f"{line}; the average micro-batch has {100 * packing.even:.0f}% of the largest one's tokens"


def _memory_line(memory: MemoryEstimate, device: Any) -> str:
    parts = {"weights": memory.weights, "activations": memory.activations, "logits": memory.logits,
             "adapter and optimizer": memory.trained}  # fmt: skip
    said = ", ".join(f"{name} {size(value)}" for name, value in parts.items())
    verdict = "" if memory.total <= memory.available else ": too much"
    return f"memory    about {size(memory.total)} ({said}); {device} has {size(memory.available)} for it{verdict}"


def size(count: float) -> str:
    """Bytes in words."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def duration(seconds: float) -> str:
    """Seconds in words."""
    if seconds < 90:
        return f"about {seconds:.0f} s"
    return f"about {seconds / 60:.0f} min" if seconds < 5400 else f"about {seconds / 3600:.1f} h"
