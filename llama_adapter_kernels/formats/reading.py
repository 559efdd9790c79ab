"""What readers share: an opened file, the reader's choices, what it found, and errors that name both sides."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from llama_adapter_kernels.adapters.state import AdapterState
from llama_adapter_kernels.formats.files import clip, listed

Shape = tuple[int, ...]
_EXACT_IN_FLOAT32 = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Source:
    """An opened adapter file (or folder of shards), before its tensors are read.

    Args:
        path: names it in messages.
        shapes: of every tensor by its name in the file.
        facts: what stands beside the tensors: settings of a trainer, the content of a configuration.
        load: copies of the tensors of these names, in the file's dtypes.
    """

    path: Path
    shapes: Mapping[str, Shape]
    facts: Mapping[str, Any]
    load: Callable[[Iterable[str]], dict[str, Tensor]]


@dataclass(frozen=True)
class Choices:
    """What a file does not say, said by its reader.

    Args:
        gate: "tanh" or "identity": what is done with the gates of an official V1 file, whose projects did both.
        prefix_length: P of a file that has only P times the number of layers.
        legacy_rows: a LitGPT file comes from a release that takes a prompt's keys and values from the rows where the
            fused projection of earlier releases had them.
        base: facts of the model that the adapter is for (see AdapterState), as far as they are known.
    """

    gate: str | None = None
    prefix_length: int | None = None
    legacy_rows: bool | None = None
    base: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    def __post_init__(self) -> None:
        if self.gate not in (None, "tanh", "identity"):
            raise ValueError(f"gate: expected tanh or identity, got {self.gate!r}")
        length = self.prefix_length
        if length is not None and (type(length) is not int or length < 1):
            raise ValueError(f"prefix_length: expected a whole number from 1, got {length!r}")


@dataclass(frozen=True)
class Reading:
    """An adapter from a file, what its reader decided or left out (one sentence each), and the file's format."""

    state: AdapterState
    notes: tuple[str, ...]
    format: str = "native"


def refuse_gate(choices: Choices, activation: str, format_name: str) -> None:
    """Files of this format are always meant with this activation.

    Raises:
        ValueError: the other one was asked for.
    """
    if choices.gate not in (None, activation):
        raise ValueError(f"gate: {format_name} files are meant with {activation}, got {choices.gate}")


def expect_names(source: Source, names: Iterable[str]) -> None:
    """All of these are there.

    Raises:
        ValueError: some are missing; the message names all of them.
    """
    missing = [name for name in names if name not in source.shapes]
    if missing:
        raise ValueError(f"{source.path}: missing keys: {listed(missing, every=True)}")


def expect_shape(source: Source, name: str, shape: Shape, why: str) -> None:
    """A tensor of the file has this shape.

    Raises:
        ValueError: it has another; the message gives both.
    """
    found = source.shapes[name]
    if found != shape:
        raise ValueError(f"{source.path}: {name}: expected shape {list(shape)} ({why}), got {clip(list(found))}")


def load_floating(source: Source, names: Iterable[str]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """These tensors in float32, and a note where that rounds them.

    Raises:
        ValueError: one is no floating tensor, or holds a NaN or infinite value.
    """
    loaded, rounded = {}, []
    for name, tensor in source.load(names).items():
        if tensor.dtype == torch.float64:
            rounded.append(name)
        elif tensor.dtype not in _EXACT_IN_FLOAT32:
            raise ValueError(f"{source.path}: {clip(name)}: expected a floating tensor, got {tensor.dtype}")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{source.path}: {clip(name)}: expected finite values, got NaN or infinity")
        loaded[name] = tensor.float()
    return loaded, (f"rounded from float64 to float32: {listed(rounded)}",) if rounded else ()


def unknown_note(names: Iterable[str]) -> tuple[str, ...]:
    """A note that lists all of these keys, if there are any."""
    names = sorted(names)
    return (f"unknown keys, kept beside the adapter and not used: {listed(names, every=True)}",) if names else ()
