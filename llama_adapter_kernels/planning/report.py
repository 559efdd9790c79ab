"""A plan in words and tables."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.table import Table

from llama_adapter_kernels.planning.devices import Device
from llama_adapter_kernels.planning.estimate import Data, Estimate, fastest
from llama_adapter_kernels.planning.operations import Adapter, adapter_parameters
from llama_adapter_kernels.planning.shapes import ModelShape

_SEPARATE = ("norms", "rotations", "activations")  # what fused kernels make shorter


@dataclass(frozen=True)
class Goal:
    """What a run is wished to take at most: seconds, and bytes of device memory."""

    seconds: float
    memory: float


def report(
    shape: ModelShape, adapter: Adapter, data: Data, device: Device, chosen: Estimate, others: Sequence[Estimate],
    goal: Goal | None,
) -> RenderableType:  # fmt: skip
    """Time by term, memory by part, what was tried, and whether the goal is reached."""
    tokens = data.tokens * data.epochs
    flop = sum(term.flop for term in chosen.terms)
    head = (
        f"{shape.parameters / 1e9:.2f} G parameters; prompts of {adapter.prefix} tokens in {adapter.layers} of "
        f"{shape.layers} layers, {adapter_parameters(shape, adapter):,} trained\n"
        f"{tokens / 1e6:.1f} M tokens in {data.epochs:g} epochs, {flop / tokens / 1e9:.1f} GFLOP each; {device.name}: "
        f"products {device.products / 1e12:.3g} TFLOP/s, copies {device.copy / 1e12:.3g} TB/s "
        f"({f'measured {device.measured}' if device.measured else 'assumed, from what an H100 reaches of its peaks'})\n"
        f"{chosen.choice}: {chosen.seconds / 60:.1f} minutes, {tokens / chosen.seconds:,.0f} tokens/s, "
        f"{chosen.bytes / 1e9:.1f} GB"
    )
    parts: list[RenderableType] = [head, _time(chosen), _memory(chosen)]
    if len(others) > 1:
        parts.append(_tried(others))
    if goal is not None:
        parts.append("\n".join(verdict(chosen, others, goal)))
    return Group(*parts)


def verdict(chosen: Estimate, others: Sequence[Estimate], goal: Goal) -> list[str]:
    """Sentences about time, memory and both at once: reached or missed, by how much, and by which term."""
    return [_on_time(chosen, others, goal), _on_memory(chosen, others, goal), _on_both(others, goal)]


def _on_time(chosen: Estimate, others: Sequence[Estimate], goal: Goal) -> str:
    wanted = f"{goal.seconds / 60:g} minutes"
    if chosen.seconds <= goal.seconds:
        largest = max(chosen.terms, key=lambda term: term.seconds)
        return f"{wanted}: yes, {chosen.seconds / 60:.1f}; most of it {largest.name}, {largest.seconds / 60:.1f}."
    over, products = chosen.seconds - goal.seconds, chosen.of("products", "head", "prompts")
    said = f"{wanted}: no, {chosen.seconds / 60:.1f}, {over / 60:.1f} too many. "
    if products > goal.seconds:
        return said + f"Matrix products alone take {products / 60:.1f}."
    rest = [term for term in chosen.terms if not term.name.startswith(("products", "head", "prompts"))]
    largest = max(rest, key=lambda term: term.seconds)
    said += (
        f"Matrix products take {products / 60:.1f}; what misses is the rest, most of all {largest.name} with "
        f"{largest.seconds / 60:.1f} (limited by {largest.limit})."
    )
    fused = [one for one in others if one.choice.fused and one.choice.low == chosen.choice.low]
    best = min(fused, key=lambda one: one.seconds, default=None)
    if best is not None and not chosen.choice.fused:
        said += (
            " Fused kernels (--compile or --liger) bring norms, rotations and activations from "
            f"{chosen.of(*_SEPARATE) / 60:.1f} to {best.of(*_SEPARATE) / 60:.1f}: {best.seconds / 60:.1f} minutes."
        )
    return said


def _on_memory(chosen: Estimate, others: Sequence[Estimate], goal: Goal) -> str:
    wanted = f"{goal.memory / 1e9:g} GB"
    if chosen.bytes <= goal.memory:
        return f"{wanted}: yes, {chosen.bytes / 1e9:.1f}."
    kept = sum(size for name, size in chosen.memory.items() if name.startswith("activations"))
    said = (
        f"{wanted}: no, {chosen.bytes / 1e9:.1f}, {(chosen.bytes - goal.memory) / 1e9:.1f} too many; activations take "
        f"{kept / 1e9:.1f}, weights {chosen.memory['weights'] / 1e9:.1f}."
    )
    lean = [one for one in others if one.choice.low and one.choice.tokens == chosen.choice.tokens]
    if lean and not chosen.choice.low:
        least = min(lean, key=lambda one: one.bytes)
        said += (
            f" Activations computed again (--memory low): {least.bytes / 1e9:.1f} GB, {least.seconds / 60:.1f} minutes."
        )
    return said


def _on_both(others: Sequence[Estimate], goal: Goal) -> str:
    best = fastest(list(others), goal.memory)
    if best is None:
        return "Both at once: no, nothing that was tried fits."
    answer = "yes" if best.seconds <= goal.seconds else "no"
    return (
        f"Both at once: {answer}, the fastest within {goal.memory / 1e9:g} GB takes {best.seconds / 60:.1f} minutes "
        f"({best.choice}; {best.bytes / 1e9:.1f} GB)."
    )


def _time(chosen: Estimate) -> Table:
    table = Table(title="Time of the run", title_justify="left")
    for name in ("term", "PFLOP", "TB", "minutes", "share", "limited by"):
        table.add_column(name, justify="left" if name in ("term", "limited by") else "right")
    for term in chosen.terms:
        table.add_row(term.name, f"{term.flop / 1e15:,.1f}", f"{term.bytes / 1e12:,.1f}", f"{term.seconds / 60:.2f}",
                      f"{term.seconds / chosen.seconds:.1%}", term.limit)  # fmt: skip
    return table


def _memory(chosen: Estimate) -> Table:
    table = Table(title="Memory at the peak (a CUDA context takes about 0.5 GB besides)", title_justify="left")
    table.add_column("part")
    table.add_column("GB", justify="right")
    for name, size in chosen.memory.items():
        table.add_row(name, f"{size / 1e9:.2f}")
    table.add_row("together", f"{chosen.bytes / 1e9:.2f}")
    return table


def _tried(others: Sequence[Estimate]) -> Table:
    table = Table(title="What was tried", title_justify="left")
    for name in ("tokens at a time", "kernels", "activations", "minutes", "GB"):
        table.add_column(name, justify="left" if name in ("kernels", "activations") else "right")
    for one in sorted(others, key=lambda one: one.seconds):
        choice = one.choice
        table.add_row(f"{choice.tokens:,}", "fused" if choice.fused else "separate",
                      "again" if choice.low else "kept", f"{one.seconds / 60:.1f}", f"{one.bytes / 1e9:.1f}")  # fmt: skip
    return table
