"""A plan in words and tables."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

from rich.console import Group, RenderableType
from rich.table import Table

from llama_adapter_kernels.planning.devices import Device
from llama_adapter_kernels.planning.estimate import Data, Estimate, fastest
from llama_adapter_kernels.planning.operations import Adapter, adapter_parameters
from llama_adapter_kernels.planning.shapes import ModelShape

_SEPARATE = ("norms", "rotations", "activations")  # what fused kernels make shorter
_PRODUCTS = ("products", "head", "prompts")  # terms of matrix products
_TIME_ERROR, _MEMORY_ERROR = 0.08, 0.02  # largest, relative to measured steps (docs/scaling.md)


@dataclass(frozen=True)
class Goal:
    """What a run is wished to take at most: seconds, and bytes of device memory; infinite where nobody asked."""

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
        f"{_amount(shape.parameters)} parameters; prompts of {adapter.prefix} tokens in {adapter.layers} of "
        f"{shape.layers} layers, {adapter_parameters(shape, adapter):,} trained\n"
        f"{_amount(tokens)} tokens in {data.epochs:g} epochs, {_amount(flop / tokens)}FLOP each; {device.name}: "
        f"products {_amount(device.products)}FLOP/s, copies {_amount(device.copy)}B/s "
        f"({f'measured {device.measured}' if device.measured else 'assumed, from what an H100 reaches of its peaks'})\n"
        f"{chosen.choice}: {_minutes(chosen.seconds)}, {tokens / chosen.seconds:,.0f} tokens/s, {_amount(chosen.bytes)}B"
    )
    parts: list[RenderableType] = [head, _time(chosen), _memory(chosen)]
    if len(others) > 1:
        parts.append(_tried(others))
    if goal is not None:
        parts.append("\n".join(verdict(chosen, others, goal)))
    return Group(*parts)


def verdict(chosen: Estimate, others: Sequence[Estimate], goal: Goal) -> list[str]:
    """Sentences about time, memory and both at once: reached or missed, by how much, and by which term."""
    said = []
    if isfinite(goal.seconds):
        said.append(_on_time(chosen, others, goal))
    if isfinite(goal.memory):
        said.append(_on_memory(chosen, others, goal))
    return [*said, _on_both(others, goal)] if len(said) == 2 else said


def _on_time(chosen: Estimate, others: Sequence[Estimate], goal: Goal) -> str:
    wanted = f"{goal.seconds / 60:g} minutes"
    if chosen.seconds <= goal.seconds:
        largest = max(chosen.terms, key=lambda term: term.seconds)
        return f"{wanted}: yes, {chosen.seconds / 60:.1f}; most of it {largest.name}, {largest.seconds / 60:.1f}."
    said = f"{wanted}: no, {chosen.seconds / 60:.1f}, {_excess(chosen, goal)}"
    if _products(chosen) > goal.seconds:
        return said
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
        least = min(others, key=lambda one: one.bytes)
        return f"Both at once: no, nothing that was tried fits; the least is {_amount(least.bytes)}B ({least.choice})."
    found = (
        f"the fastest within {goal.memory / 1e9:g} GB takes {best.seconds / 60:.1f} minutes "
        f"({best.choice}; {best.bytes / 1e9:.1f} GB)"
    )
    if best.seconds > goal.seconds:
        return f"Both at once: no, {found}, {_excess(best, goal)}"
    said = f"Both at once: yes, {found}."
    spare = goal.memory - best.bytes
    if best.seconds * (1 + _TIME_ERROR) > goal.seconds or spare < _MEMORY_ERROR * best.bytes:
        said += (
            f" It is close: {(goal.seconds - best.seconds) / 60:.1f} minutes and {spare / 1e9:.2f} GB to spare, and plans "
            f"were up to {_TIME_ERROR:.0%} of the time and {_MEMORY_ERROR:.0%} of the memory away from measured steps."
        )
    return said


def _excess(one: Estimate, goal: Goal) -> str:
    """By how much a time misses, and what is to blame."""
    over, products = one.seconds - goal.seconds, _products(one)
    said = f"{over / 60:.1f} too many. "
    if products > goal.seconds:
        return said + f"Matrix products alone take {products / 60:.1f}."
    rest = [term for term in one.terms if not term.name.startswith(_PRODUCTS)]
    largest = max(rest, key=lambda term: term.seconds)
    return said + (
        f"Matrix products take {products / 60:.1f}; what misses is the rest, most of all {largest.name} with "
        f"{largest.seconds / 60:.1f} (limited by {largest.limit})."
    )


def _products(one: Estimate) -> float:
    return one.of(*_PRODUCTS)


def _time(chosen: Estimate) -> Table:
    table = Table(title="Time of the run", title_justify="left")
    flop, flops = _unit(max(term.flop for term in chosen.terms), "FLOP")
    size, sizes = _unit(max(term.bytes for term in chosen.terms), "B")
    seconds, time = (60.0, "minutes") if chosen.seconds >= 120 else (1.0, "seconds")
    for name in ("term", flops, sizes, time, "share", "limited by"):
        table.add_column(name, justify="left" if name in ("term", "limited by") else "right")
    for term in chosen.terms:
        table.add_row(term.name, f"{term.flop / flop:,.1f}", f"{term.bytes / size:,.1f}", f"{term.seconds / seconds:.2f}",
                      f"{term.seconds / chosen.seconds:.1%}", term.limit)  # fmt: skip
    return table


def _memory(chosen: Estimate) -> Table:
    table = Table(title="Memory at the peak (a CUDA context takes about 0.5 GB besides)", title_justify="left")
    divisor, unit = _unit(chosen.bytes, "B")
    table.add_column("part")
    table.add_column(unit, justify="right")
    for name, size in chosen.memory.items():
        table.add_row(name, f"{size / divisor:.2f}")
    table.add_row("together", f"{chosen.bytes / divisor:.2f}")
    return table


def _tried(others: Sequence[Estimate]) -> Table:
    table = Table(title="What was tried", title_justify="left")
    divisor, unit = _unit(max(one.bytes for one in others), "B")
    for name in ("tokens at a time", "kernels", "activations", "minutes", unit):
        table.add_column(name, justify="left" if name in ("kernels", "activations") else "right")
    for one in sorted(others, key=lambda one: one.seconds):
        choice = one.choice
        kernels, activations = "fused" if choice.fused else "separate", "again" if choice.low else "kept"
        numbers = f"{one.seconds / 60:.1f}", f"{one.bytes / divisor:.1f}"
        table.add_row(f"{choice.tokens:,}", kernels, activations, *numbers)
    return table


def _unit(largest: float, unit: str) -> tuple[float, str]:
    """What to divide by, and the name of what that gives, so that the largest of some numbers is 1 to 1,000."""
    for divisor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if largest >= divisor:
            return divisor, prefix + unit
    return 1e3, "k" + unit


def _amount(number: float) -> str:
    """Three digits and a prefix, ready for a unit: "6.74 G"."""
    divisor, prefix = _unit(number, "")
    return f"{number / divisor:.3g} {prefix}"


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} minutes" if seconds >= 120 else f"{seconds:.1f} seconds"
