"""The named cases: one table for the command, the pytest-benchmark files and the report.

Sizes differ between CPU and GPU, so that one call takes milliseconds on either; every result states its own shape.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import Literal

from llama_adapter_kernels import testing
from llama_adapter_kernels.bench.lengths import alpaca_lengths

Question = Literal["attention", "varlen", "decode", "module", "training", "generation"]
Mode = Literal["forward", "forward+backward", "step", "token"]
PREFIX_LENGTH = 10  # the paper's
DTYPES = ("float32", "bfloat16", "float16")
INFERENCE: tuple[Mode, ...] = ("forward", "token")  # modes without gradients

MODES: dict[Question, tuple[Mode, ...]] = {
    "attention": ("forward", "forward+backward"),
    "varlen": ("forward", "forward+backward"),
    "decode": ("forward",),
    "module": ("forward", "forward+backward"),
    "training": ("step",),
    "generation": ("token",),
}


@dataclass(frozen=True)
class ModelShape:
    """A Llama model of `transformers` with random weights: one layer for module cases.

    cached: tokens already in the cache; the case is one new token then. lengths: of the sequences in a right-padded
    batch. feed_forward: 0 for Llama's 8/3 of the hidden size, in whole 64s.
    """

    hidden: int
    heads_q: int
    heads_kv: int
    head_dim: int
    layers: int
    batch: int
    sequence: int
    vocabulary: int = 1024
    cached: int = 0
    lengths: tuple[int, ...] | None = None
    feed_forward: int = 0

    @property
    def inner(self) -> int:
        """Size of the feed-forward part."""
        return self.feed_forward or (self.hidden * 8 // 3 + 63) // 64 * 64


@dataclass(frozen=True)
class BenchCase:
    """One row of the table; `problem` is what the input generator of the tests takes.

    sweep: the case belongs to a plot of time by sequence length. on_request: it runs only where its name is given.
    """

    name: str
    title: str
    question: Question
    problem: testing.Case | None = None
    model: ModelShape | None = None
    key_lengths: tuple[int, ...] | None = None  # valid keys of each sequence
    quick: bool = False
    sweep: str | None = None
    dtypes: tuple[str, ...] = DTYPES[:2]
    on_request: bool = False

    @property
    def modes(self) -> tuple[Mode, ...]:
        if self.question == "module" and self.model is not None and self.model.cached:
            return ("forward",)
        return MODES[self.question]

    @property
    def cold(self) -> bool:
        """Whether caches are flushed before every call. A decode step finds its keys in memory: the weights came between."""
        return self.question == "decode"

    @property
    def sequence(self) -> int:
        if self.problem is not None:
            return self.problem.seq_k
        return self.model.sequence if self.model is not None else 0

    @property
    def shape(self) -> dict[str, int]:
        """Sizes by name, for the result file. Packed cases: batch sequences, the longest of `sequence` tokens."""
        if self.problem is not None:
            case, lengths = self.problem, self.problem.lengths
            batch = len(lengths) if lengths is not None else case.batch
            longest = max(pair[0] for pair in lengths) if lengths is not None else case.seq_k
            sizes = {"batch": batch, "heads_q": case.heads_q, "heads_kv": case.heads_kv, "head_dim": case.head_dim,
                     "sequence": longest, "queries": case.seq_q if lengths is None else longest}  # fmt: skip
            return sizes | ({"tokens": sum(pair[0] for pair in lengths)} if lengths is not None else {})
        assert self.model is not None
        model = self.model
        return {"batch": model.batch, "heads_q": model.heads_q, "heads_kv": model.heads_kv, "head_dim": model.head_dim,
                "hidden": model.hidden, "layers": model.layers, "sequence": model.sequence + model.cached}  # fmt: skip


def _attention(
    name: str, title: str, batch: int, heads: tuple[int, int], head_dim: int, sequence: int, is_causal: bool = True,
    key_lengths: tuple[int, ...] | None = None, quick: bool = True, sweep: str | None = None,
    dtypes: tuple[str, ...] = DTYPES[:2], layout: Literal["bhsd", "bshd"] = "bshd",
) -> BenchCase:  # fmt: skip
    problem = testing.Case(
        batch=batch, heads_q=heads[0], heads_kv=heads[1], seq_q=sequence, seq_k=sequence, head_dim=head_dim,
        prefix_length=PREFIX_LENGTH, is_causal=is_causal, layout=layout,
    )  # fmt: skip
    return BenchCase(name, title, "attention", problem, None, key_lengths, quick, sweep, dtypes)


def _packed(name: str, title: str, count: int, heads: tuple[int, int], head_dim: int, quick: bool) -> BenchCase:
    lengths = alpaca_lengths(count)
    problem = testing.Case(
        heads_q=heads[0], heads_kv=heads[1], head_dim=head_dim, prefix_length=PREFIX_LENGTH, is_causal=True,
        lengths=tuple((length, length) for length in lengths),
    )  # fmt: skip
    return BenchCase(name, title, "varlen", problem, quick=quick)


def _decode(
    name: str, title: str, heads: tuple[int, int], head_dim: int, lengths: tuple[int, ...], quick: bool
) -> BenchCase:
    problem = testing.Case(
        batch=len(lengths), heads_q=heads[0], heads_kv=heads[1], seq_q=1, seq_k=max(lengths), head_dim=head_dim,
        prefix_length=PREFIX_LENGTH, is_causal=True,
    )  # fmt: skip
    ragged = lengths if min(lengths) < max(lengths) else None
    return BenchCase(name, title, "decode", problem, None, ragged, quick)


def cases(device_type: str) -> dict[str, BenchCase]:
    """The table for "cpu" or "cuda", by name."""
    gpu = device_type == "cuda"
    sequence, batch = (2048, 8) if gpu else (512, 1)
    roberta = (512, 384, 256, 128) * 8 if gpu else (512, 256)
    seven = f"LLaMA-7B, {sequence} tokens"
    table = [
        _attention("llama-7b", seven, batch, (32, 32), 128, sequence, sweep="LLaMA-7B"),
        _attention("llama-3-8b", f"LLaMA-3-8B, {sequence} tokens", batch, (32, 8), 128, sequence, quick=False),
        _attention("llama-1b", f"Llama-3.2-1B, {sequence} tokens", batch, (32, 8), 64, sequence),
        _attention("vit-l-16", "ViT-L/16, 577 tokens, full", 16 if gpu else 1, (16, 16), 64, 577, is_causal=False),
        _attention(
            "roberta-large",
            "RoBERTa-large, 512 tokens, padded",
            len(roberta),
            (16, 16),
            64,
            512,
            is_causal=False,
            key_lengths=roberta,
        ),
        _packed("alpaca-7b", "Alpaca packed, LLaMA-7B", 128 if gpu else 8, (32, 32), 128, quick=True),
        _packed("alpaca-1b", "Alpaca packed, Llama-3.2-1B", 128 if gpu else 8, (32, 8), 64, quick=False),
        _decode("decode-7b", "Decode, LLaMA-7B, 2048 cached", (32, 32), 128, (2048,), quick=True),
        _decode("decode-8b", "Decode, LLaMA-3-8B, 8192 cached", (32, 8), 128, (8192,), quick=False),
        _decode(
            "decode-8b-batch", "Decode, LLaMA-3-8B, 8 sequences", (32, 8), 128, tuple(range(128, 1025, 128)), quick=True
        ),
        *_models(gpu, sequence),
        *_sweep(gpu),
        *([] if gpu else _floors()),
    ]
    if gpu:  # nobody trains attention in float32 on a GPU
        table = [replace(case, dtypes=("bfloat16",)) for case in table]
    return {case.name: case for case in table}


def _models(gpu: bool, sequence: int) -> list[BenchCase]:
    """Attention modules and whole models. They are smaller than the attention cases: their truth in float64 keeps every
    head's scores of every sequence.
    """
    one_b = ModelShape(
        hidden=2048, heads_q=32, heads_kv=8, head_dim=64, layers=1, batch=2 if gpu else 1, sequence=sequence
    )
    lengths = alpaca_lengths(16 if gpu else 4, seed=1)
    small = ModelShape(
        hidden=2048 if gpu else 512, heads_q=16 if gpu else 8, heads_kv=16 if gpu else 8, head_dim=128 if gpu else 64,
        layers=4, batch=2, sequence=512, vocabulary=4096,
    )  # fmt: skip
    alpaca = replace(small, batch=len(lengths), sequence=max(lengths), lengths=lengths, vocabulary=1024)
    module = f"Llama-3.2-1B attention module, {sequence} tokens"
    one_token = replace(one_b, sequence=1, batch=1, cached=512)
    return [
        BenchCase("module-1b", module, "module", model=one_b, quick=True),
        BenchCase("module-1b-token", "Llama-3.2-1B attention module, one token", "module", model=one_token, quick=True),
        BenchCase("training", "Training step, small Llama, Alpaca lengths", "training", model=alpaca, quick=True),
        BenchCase("training-512", "Training step, small Llama, 2 x 512 tokens", "training", model=small,
                  on_request=True),
        BenchCase("generation", "One token, small Llama, 512 cached", "generation",
                  model=replace(small, sequence=1, cached=512), quick=True),
    ]  # fmt: skip


def _sweep(gpu: bool) -> list[BenchCase]:
    return [
        _attention(
            f"llama-7b-{length}", f"LLaMA-7B, {length} tokens", max(1, 16384 // length) if gpu else 1, (32, 32), 128, length,
            quick=False, sweep="LLaMA-7B", dtypes=DTYPES[:1],
        )
        for length in ((512, 1024, 4096, 8192, 16384) if gpu else (128, 256, 1024, 2048))
    ]  # fmt: skip


def _floors() -> list[BenchCase]:
    """What benchmarks/attention_floors.py times: contiguous inputs, on a CPU."""
    shapes = {"floor-32x512": (1, 32, 512, 128), "floor-4x8x512": (4, 8, 512, 64), "floor-8x2048": (1, 8, 2048, 64)}
    found = []
    for name, (batch, heads, sequence, head_dim) in shapes.items():
        case = _attention(name, f"({batch}, {heads}, {sequence}, {head_dim})", batch, (heads, heads), head_dim, sequence,
                          dtypes=DTYPES if name == "floor-4x8x512" else DTYPES[:2], layout="bhsd")  # fmt: skip
        found.append(replace(case, on_request=True))
    decode = _decode("floor-decode", "Decode, LLaMA-3-8B, 8 sequences of 4096", (32, 8), 128, (4096,) * 8, quick=False)
    return [*found, replace(decode, dtypes=("bfloat16",), on_request=True)]


def select(device_type: str, names: list[str] | None = None, quick: bool = False) -> list[BenchCase]:
    """The cases asked for, in the table's order; without names those that run unasked.

    Raises:
        ValueError: an unknown name; the message lists the known ones.
    """
    table = cases(device_type)
    check_names("case", names, table)
    if names:
        return [case for case in table.values() if case.name in names]
    return [case for case in table.values() if not case.on_request and (case.quick or not quick)]


def check_names(kind: str, names: Iterable[str] | None, known: Collection[str]) -> None:
    """
    Raises:
        ValueError: an unknown name; the message lists the known ones.
    """
    for name in names or ():
        if name not in known:
            raise ValueError(f"{kind}: expected one of {', '.join(known)}; got {name!r}")
