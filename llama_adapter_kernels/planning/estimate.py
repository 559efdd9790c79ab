"""How long a run takes and how much memory, term by term, in one configuration or in the fastest that fits."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from llama_adapter_kernels.planning.devices import Device
from llama_adapter_kernels.planning.memory import step_memory
from llama_adapter_kernels.planning.operations import (
    Adapter,
    Batch,
    Part,
    adapter_parameters,
    optimizer_part,
    step_parts,
)
from llama_adapter_kernels.planning.shapes import ModelShape

SIZES = (1024, 1536, 2048, 4096, 8192)  # tokens of a micro-batch that are tried
STEP_TOKENS = 8192  # of an optimizer step at least: about 64 examples of Alpaca
WIDTHS = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Data:
    """What is trained on.

    Attributes:
        tokens: of one epoch.
        pairs: (query, key) pairs per token that causal attention within the sequences has.
        responses: the part of the tokens that is predicted.
    """

    tokens: float
    epochs: float
    pairs: float
    responses: float


@dataclass(frozen=True)
class Term:
    """A part of a run: limit says what its time is that of (compute, memory or host)."""

    name: str
    flop: float
    bytes: float
    seconds: float
    limit: str


@dataclass(frozen=True)
class Choice:
    """How a step is carried out."""

    tokens: int
    fused: bool
    low: bool

    def __str__(self) -> str:
        fused = "fused norms, rotations and activations" if self.fused else "separate kernels"
        return f"{self.tokens:,} tokens at a time, {fused}, activations {'computed again' if self.low else 'kept'}"


@dataclass(frozen=True)
class Estimate:
    """terms: of the whole run. memory: bytes at the peak by part."""

    choice: Choice
    terms: list[Term]
    memory: dict[str, float] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        return sum(term.seconds for term in self.terms)

    @property
    def bytes(self) -> float:
        return sum(self.memory.values())

    def of(self, *names: str) -> float:
        """Seconds of the terms whose name begins with one of these."""
        return sum(term.seconds for term in self.terms if term.name.startswith(names))


def estimate(shape: ModelShape, adapter: Adapter, data: Data, device: Device, dtype: str, choice: Choice) -> Estimate:
    """Time and memory of a run with micro-batches of `choice.tokens` tokens, packed full."""
    width, runs = WIDTHS[dtype], data.tokens * data.epochs / choice.tokens
    batch = Batch(choice.tokens, choice.tokens * data.pairs, choice.tokens * data.responses)
    parts = step_parts(shape, adapter, batch, width=width, fused=choice.fused, low=choice.low)
    steps = data.tokens * data.epochs / max(choice.tokens, STEP_TOKENS)
    terms = [_term(part, device, runs) for part in parts]
    trained = adapter_parameters(shape, adapter)
    terms.append(_term(optimizer_part(trained), device, steps))
    host = runs * device.launch * sum(part.launches for part in parts)
    waiting = host - sum(term.seconds for term in terms)
    if waiting > 0:
        terms.append(Term("waiting for the host", 0.0, 0.0, waiting, "host"))
    memory = step_memory(shape, adapter, batch, width=width, fused=choice.fused, low=choice.low)
    return Estimate(choice, terms, memory)


def choices(fused: bool | None = None, low: bool | None = None, tokens: int | None = None) -> Iterator[Choice]:
    """All that are tried, or those that agree with what is given."""
    for size in SIZES if tokens is None else (tokens,):
        for is_fused in (False, True) if fused is None else (fused,):
            for is_low in (False, True) if low is None else (low,):
                yield Choice(size, is_fused, is_low)


def fastest(estimates: list[Estimate], memory: float) -> Estimate | None:
    """The fastest that takes at most `memory` bytes; None where none does."""
    return min((one for one in estimates if one.bytes <= memory), key=lambda one: one.seconds, default=None)


def _term(part: Part, device: Device, runs: float) -> Term:
    rate = device.copy * {"products": 1.0, "attention": device.attention, "memory": device.elementwise}[part.kind]
    seconds = {"compute": part.flop / device.products, "memory": part.bytes / rate}
    limit = max(seconds, key=lambda name: seconds[name])
    return Term(part.name, runs * part.flop, runs * part.bytes, runs * seconds[limit], limit)
