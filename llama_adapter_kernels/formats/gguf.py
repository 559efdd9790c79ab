"""GGUF files: read by transformers with the package `gguf`, written as a plain Hugging Face folder.

The reader of that package believes what a file says of its own sizes, so the file's structure is followed first and compared
with its size; so are the sizes of the model with those of its tensors.
"""

import re
import struct
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch

from llama_adapter_kernels.formats.files import clip, listed, new_folder, refuse_existing

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}  # by type number
_STRING, _ARRAY = 8, 9
_LONGEST_NAME = 1 << 16
_MOST_DIMENSIONS = 4
_BLOCK = re.compile(r"blk\.(\d+)\..+")


@dataclass
class Header:
    """What a GGUF file says of itself: scalars, strings and lengths of arrays by key, and shapes of tensors by name."""

    values: dict[str, Any] = field(default_factory=dict)
    lengths: dict[str, int] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)


def is_gguf(path: Path) -> bool:
    """The file `path` is one of this format."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def convert(source: Path, target: Path, dtype: torch.dtype = torch.bfloat16) -> tuple[str, ...]:
    """Writes the model and tokenizer of a GGUF file to the new folder `target`, in `dtype`.

    Returns:
        Notes on what was done.

    Raises:
        OSError: something cannot be read or written, or `target` is there already. Nothing of it is left then.
        ValueError: the file lies about what it holds, or it is of a model that transformers does not know.
        ModuleNotFoundError: transformers or gguf is not installed.
    """
    import gguf  # noqa: F401  (transformers needs it, and would say so less clearly)

    refuse_existing(target)
    header = read_header(source)
    model, tokenizer = _load(source, dtype)
    with new_folder(target) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    name = header.values.get("general.name", source.name)
    return (f"{clip(name)}: {len(header.shapes)} tensors, written in {str(dtype).removeprefix('torch.')}",)


def _load(source: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """A plain model with the file's weights, and its tokenizer. What transformers loads counts as quantised there."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, name = str(source.resolve().parent), source.name
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
        loaded, found = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=name, dtype=dtype, output_loading_info=True
        )
    # Broad on purpose: transformers and gguf raise whatever their parsers stumble over (IndexError, struct.error, KeyError,
    # errors of their own), and nothing else happens inside. The message keeps the kind, and the traceback its cause.
    except Exception as error:
        raise ValueError(f"{source}: transformers cannot read it ({type(error).__name__}: {clip(error)})") from error
    missing = [key for kind in ("missing_keys", "mismatched_keys") for key in found[kind]]
    if missing:
        raise ValueError(f"{source}: missing tensors of the model: {listed(map(str, missing))}")
    settings = loaded.config.to_dict()
    settings.pop("quantization_config", None)
    config = type(loaded.config).from_dict(settings)
    config.dtype = dtype
    with torch.device("meta"):
        plain = type(loaded)(config)
    plain.load_state_dict(loaded.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = loaded.generation_config
    return plain, tokenizer


def read_header(path: Path) -> Header:
    """The header of a GGUF file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no such file, or it says more than it holds.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            header, ends = _Reader(file, size).header()
    except struct.error:
        raise ValueError(f"{path}: damaged or cut off: it ends within its header at {size} bytes") from None
    except ValueError as error:
        raise ValueError(f"{path}: {clip(error)}") from None
    for name, end in ends.items():
        if end > size:
            raise ValueError(f"{path}: damaged or cut off: {clip(name)} would end at byte {end} of {size}")
    _check_sizes(path, header)
    return header


class _Reader:
    """Reads values one after the other; nothing is taken that is longer than the file."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size = file, size

    def number(self, kind: str) -> Any:
        return struct.unpack(f"<{kind}", self.file.read(struct.calcsize(f"<{kind}")))[0]

    def count(self, smallest: int, what: str) -> int:
        """How many items of at least `smallest` bytes follow."""
        count: int = self.number("Q")
        if count * smallest > self.size - self.file.tell():
            raise ValueError(f"damaged or forged: {count} {what} do not fit into {self.size} bytes")
        return count

    def string(self, longest: int | None = None) -> str:
        length = self.count(1, "bytes of text")
        if longest is not None and length > longest:
            raise ValueError(f"damaged or forged: a name of {length} bytes")
        return self.file.read(length).decode("utf-8")

    def skip(self, length: int) -> None:
        self.file.seek(length, 1)

    def header(self) -> tuple[Header, dict[str, int]]:
        """The header, and where each tensor ends, in bytes of the file."""
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        if self.file.read(4) != b"GGUF":
            raise ValueError("expected a GGUF file, it starts otherwise")
        version = self.number("I")
        if version not in (2, 3):
            raise ValueError(f"expected GGUF of version 2 or 3 in little-endian order, got {version}")
        header = Header()
        tensors, keys = self.count(24, "tensors"), self.count(13, "keys")
        for _ in range(keys):
            key = self.string(_LONGEST_NAME)
            if key in header.values or key in header.lengths:
                raise ValueError(f"{key!r} is there twice")
            self._value(header, key)
        places: dict[str, tuple[int, int]] = {}
        for _ in range(tensors):
            name = self.string(_LONGEST_NAME)
            dimensions = self.number("I")
            if name in header.shapes or not 1 <= dimensions <= _MOST_DIMENSIONS:
                raise ValueError(f"{name!r}: there twice, or of {dimensions} dimensions")
            shape = tuple(self.number("Q") for _ in range(dimensions))
            kind, offset = self.number("I"), self.number("Q")
            try:
                block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
            except (ValueError, KeyError):
                raise ValueError(f"{name!r}: unknown type of numbers {kind}") from None
            header.shapes[name] = shape
            places[name] = (offset, -(-prod(shape) // block) * block_bytes)
        alignment = header.values.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
            raise ValueError(f"general.alignment: expected a power of two, got {alignment!r}")
        start = -(-self.file.tell() // alignment) * alignment
        return header, {name: start + offset + length for name, (offset, length) in places.items()}

    def _value(self, header: Header, key: str) -> None:
        kind = self.number("I")
        if kind in _SCALARS:
            header.values[key] = self.number(_SCALARS[kind])
        elif kind == _STRING:
            header.values[key] = self.string()
        elif kind == _ARRAY:
            item = self.number("I")
            if item not in _SCALARS and item != _STRING:
                raise ValueError(f"{key!r}: expected an array of numbers or texts, got items of type {item}")
            width = struct.calcsize(f"<{_SCALARS.get(item, 'Q')}")
            header.lengths[key] = length = self.count(width, "items of an array")
            if item == _STRING:
                for _ in range(length):
                    self.skip(self.count(1, "bytes of text"))
            else:
                self.skip(length * width)
        else:
            raise ValueError(f"{key!r}: unknown type of value {kind}")


def _check_sizes(path: Path, header: Header) -> None:
    """Sizes that decide how large a model is built are those of the tensors."""
    kind = header.values.get("general.architecture")
    if not isinstance(kind, str):
        raise ValueError(f"{path}: general.architecture: expected a name, got {clip(repr(kind))}")
    blocks = {int(match[1]) for name in header.shapes if (match := _BLOCK.fullmatch(name))}
    embeddings = header.shapes.get("token_embd.weight", ())
    if len(embeddings) != 2:
        raise ValueError(f"{path}: token_embd.weight: expected a matrix, got shape {clip(list(embeddings))}")
    known: list[tuple[str, int | None, Any]] = [
        (f"{kind}.block_count", len(blocks), header.values.get(f"{kind}.block_count")),
        (
            f"{kind}.embedding_length",
            embeddings[0] if embeddings else None,
            header.values.get(f"{kind}.embedding_length"),
        ),
        (
            "tokenizer.ggml.tokens",
            embeddings[1] if len(embeddings) == 2 else None,
            header.lengths.get("tokenizer.ggml.tokens"),
        ),
    ]
    told_sizes = {"feed_forward_length": ("ffn_up", 1), "attention.head_count": ("attn_q", None)}
    told_sizes["attention.head_count_kv"] = ("attn_k", None)
    heads, width = header.values.get(f"{kind}.attention.head_count"), header.values.get(f"{kind}.attention.key_length")
    if width is None and isinstance(heads, int) and heads and embeddings:
        width = embeddings[0] // heads
    for name, (tensor, unit) in told_sizes.items():
        rows = header.shapes.get(f"blk.0.{tensor}.weight", ())[-1:]
        told = header.values.get(f"{kind}.{name}")
        if rows and told is not None and isinstance(width, int):
            per_unit = unit or max(width, 1)
            known.append((f"{kind}.{name}", rows[0] // per_unit if rows[0] % per_unit == 0 else None, told))
    if f"{kind}.vocab_size" in header.values:
        known.append((f"{kind}.vocab_size", embeddings[1], header.values[f"{kind}.vocab_size"]))
    for name, tensors, told in known:
        if told is None or tensors is None or told != tensors:
            raise ValueError(f"{path}: {name}: expected {tensors} as the tensors have it, got {clip(repr(told))}")
