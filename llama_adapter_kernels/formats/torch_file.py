"""Files of torch.save, read by torch.load(weights_only=True) after their structure was checked against their size.

weights_only keeps a file from running code, but not from lying: a storage may claim more bytes than its record has, a view
may repeat one number a trillion times, an allowed call like bytearray(10**12) takes memory, and a name that is there twice
hides the first. So the archive and its pickle are inspected first, without building anything, and only what
state dicts consist of is let through: dictionaries, lists, numbers, strings, tensors, and the settings of argparse.
"""

import argparse
import io
import pickle
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor

from llama_adapter_kernels.formats.files import clip, listed

_LONGEST_PICKLE = 32 << 20  # bytes; a tensor takes some 150
_MOST_DIMENSIONS = 16
_DTYPES = {
    "FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}  # fmt: skip


@dataclass(frozen=True)
class TensorRecord:
    """A tensor as a torch file describes it, before any of it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    key: str


class TorchFile:
    """An inspected file of torch.save.

    Args:
        path: a file in torch's zip format.

    Attributes:
        content: what the file holds, with a TensorRecord in place of each tensor, Settings in place of a Namespace.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no such file, it would run code, or it says more than it holds.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        _check_kind(path)
        try:
            with zipfile.ZipFile(path) as archive:
                self._records = _records(archive, path.stat().st_size)
                root = next(name for name in self._records if name.endswith("/data.pkl")).removesuffix("data.pkl")
                self._root = root
                content = _read(archive, self._records[f"{root}data.pkl"], _LONGEST_PICKLE)
            self.content = _Inspector(content, root, self._records).load()
        except _RefusedError as error:
            raise ValueError(f"{path}: {error}") from None
        # Broad on purpose: whoever made the bytes chooses where zipfile and pickle stumble, and so what they raise
        # (KeyError, struct.error, RecursionError). Nothing but reading happens inside: each is the file's fault.
        except Exception as error:
            raise ValueError(
                f"{path}: expected a file of torch.save ({type(error).__name__}: {clip(error)})"
            ) from error

    def tensors(self, place: tuple[str, ...], names: Iterable[str]) -> dict[str, Tensor]:
        """Copies of some tensors of one dictionary of the file.

        Args:
            place: the keys that lead to the dictionary, () for the outermost.
            names: of the tensors in it.

        Raises:
            ValueError: their bytes are not those that were saved.
        """
        names = list(names)
        described = _at(self.content, place)
        self._check_bytes({described[name].key for name in names})
        try:
            with torch.serialization.safe_globals([argparse.Namespace]):
                loaded = torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
            mapped = {name: _at(loaded, place)[name] for name in names}
        # Broad on purpose, as above: torch reads parts of the archive that zipfile takes no notice of.
        except Exception as error:
            raise ValueError(f"{self.path}: damaged ({type(error).__name__}: {clip(error)})") from error
        copies = {}
        for name in names:
            tensor, record = mapped[name], described[name]
            if tuple(tensor.shape) != record.shape or tensor.dtype != record.dtype or tensor.layout != torch.strided:
                raise ValueError(f"{self.path}: {clip(name)}: torch reads another tensor than the file describes")
            copies[name] = tensor.detach().clone(memory_format=torch.contiguous_format)
        return copies

    def _check_bytes(self, keys: set[str]) -> None:
        with zipfile.ZipFile(self.path) as archive:
            for key in keys:
                record = self._records[f"{self._root}data/{key}"]
                if record.CRC == 0:  # torch.serialization.set_crc32_options(False) writes none
                    continue
                found = 0
                try:
                    with archive.open(record) as stream:
                        while chunk := stream.read(1 << 20):
                            found = zlib.crc32(chunk, found)
                except (zipfile.BadZipFile, EOFError) as error:
                    raise ValueError(f"{self.path}: damaged, {clip(record.filename)}: {clip(error)}") from None


class _RefusedError(Exception):
    """What is wrong with a file, in words for its user."""


def _check_kind(path: Path) -> None:
    if path.is_dir():
        raise IsADirectoryError(f"{path}: expected a file, it is a folder")
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith(b"PK\x03\x04"):
        return
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path}: expected a file of torch.save, it is a Git LFS pointer: the file itself is not here")
    if start.startswith(b"\x80\x02"):
        raise ValueError(
            f"{path}: expected torch's zip format, it is a bare pickle (torch before 1.6); "
            "load it with such a torch where you trust it, and torch.save it again"
        )
    raise ValueError(f"{path}: expected a file of torch.save (a zip archive), it starts with {clip(start[:16])}")


def _records(archive: zipfile.ZipFile, size: int) -> dict[str, zipfile.ZipInfo]:
    """The records of the archive by name. Every one lies within the file as it is, under a name of its own."""
    records = archive.infolist()
    names = Counter(record.filename for record in records)
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise _RefusedError(f"damaged or forged: records that are there twice: {listed(twice)}")
    for record in records:
        if record.compress_type != zipfile.ZIP_STORED or record.file_size != record.compress_size:
            raise _RefusedError(
                f"expected records that are not compressed (as torch writes them), got {record.filename!r}"
            )
        if record.flag_bits & 1 or record.header_offset + record.file_size > size:
            raise _RefusedError(f"damaged or forged: {clip(record.filename)} would end after the file's {size} bytes")
    pickles = [name for name in names if name.endswith("/data.pkl")]
    if len(pickles) != 1 or any(name.endswith("/constants.pkl") for name in names):
        raise _RefusedError(f"expected a file of torch.save with one data.pkl, got records {listed(names)}")
    return {record.filename: record for record in records}


def _read(archive: zipfile.ZipFile, record: zipfile.ZipInfo, longest: int) -> bytes:
    if record.file_size > longest:
        raise _RefusedError(f"expected at most {longest} bytes of structure, got {record.file_size}")
    if record.CRC == 0:
        del record.CRC  # none was written; zipfile then does not compare
        content = archive.read(record)
        record.CRC = 0
        return content
    return archive.read(record)


def _at(content: Any, place: tuple[str, ...]) -> Mapping[Any, Any]:
    for key in place:
        content = content[key]
    return content  # type: ignore[no-any-return]


class _Dictionary(dict[Any, Any]):
    """A dictionary that refuses a second value for a key, and keys other than strings and whole numbers."""

    def __init__(self, *arguments: Any) -> None:
        if arguments:
            raise _RefusedError("expected dictionaries that are filled entry by entry")
        super().__init__()

    def __setitem__(self, key: Any, value: Any) -> None:
        if not isinstance(key, str | int):
            raise _RefusedError(f"expected names as keys, got a {type(key).__name__}")
        if key in self:
            raise _RefusedError(f"{clip(key)!r} is there twice")
        super().__setitem__(key, value)


class Settings:
    """Stands for an argparse.Namespace: the values of its attributes, and no more."""

    values: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class _Storage:
    dtype: torch.dtype
    key: str
    length: int


class _Inspector(pickle._Unpickler):
    """Follows a pickle without building what it describes.

    It knows the operations that torch's own restricted reader knows, and calls nothing but the methods of this module.
    Python's own unpickler, not C's: it takes no memory for what a pickle merely announces.
    """

    def __init__(self, content: bytes, root: str, records: Mapping[str, zipfile.ZipInfo]) -> None:
        super().__init__(io.BytesIO(content), encoding="utf-8")
        self.root, self.records = root, records

    def _empty_dictionary(self) -> None:
        self.append(_Dictionary())  # type: ignore[attr-defined]

    def _attributes(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]  # type: ignore[attr-defined]
        if not (isinstance(target, _Dictionary | Settings) and isinstance(state, dict)):
            raise _RefusedError(f"expected attributes of a dictionary, got those of a {clip(type(target).__name__)}")
        if isinstance(target, Settings):
            target.values = state

    dispatch: ClassVar[dict[int, Any]] = {
        operation[0]: pickle._Unpickler.dispatch[operation[0]]
        for operation in (
            pickle.PROTO, pickle.STOP, pickle.GLOBAL, pickle.NEWOBJ, pickle.REDUCE, pickle.APPEND,
            pickle.APPENDS, pickle.SETITEM, pickle.SETITEMS, pickle.MARK, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2,
            pickle.TUPLE3, pickle.NONE, pickle.NEWFALSE, pickle.NEWTRUE, pickle.EMPTY_TUPLE, pickle.EMPTY_LIST,
            pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.BINFLOAT, pickle.BINUNICODE, pickle.SHORT_BINSTRING,
            pickle.BINPERSID, pickle.BINGET, pickle.LONG_BINGET, pickle.BINPUT, pickle.LONG_BINPUT, pickle.LONG1,
        )
    } | {pickle.EMPTY_DICT[0]: _empty_dictionary, pickle.BUILD[0]: _attributes}  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        if module in ("torch", "torch.storage") and name in _DTYPES:
            return _DTYPES[name]
        known = {
            "collections.OrderedDict": _Dictionary,
            "argparse.Namespace": Settings,
            "torch._utils._rebuild_tensor_v2": self._tensor,
            "torch._utils._rebuild_parameter": self._parameter,
        }
        try:
            return known[f"{module}.{name}"]
        except KeyError:
            raise _RefusedError(
                f"refused: it holds {clip(f'{module}.{name}')}, and reading that can run code or take any memory. Only "
                "tensors, numbers, strings and dictionaries of them are read; where you trust the file, save those alone"
            ) from None

    def persistent_load(self, saved: Any) -> _Storage:
        if not (isinstance(saved, tuple) and len(saved) == 5 and saved[0] == "storage"):
            raise _RefusedError(f"expected a storage, got {clip(saved)}")
        _, dtype, key, _, length = saved
        record = self.records.get(f"{self.root}data/{key}") if isinstance(key, str) else None
        if not isinstance(dtype, torch.dtype) or record is None or not _is_size(length):
            raise _RefusedError(f"expected a storage with a record of its own, got {clip(saved)}")
        if length * dtype.itemsize > record.file_size:
            raise _RefusedError(
                f"damaged or forged: a storage of {length * dtype.itemsize} bytes, of which the file has {record.file_size}"
            )
        return _Storage(dtype, key, length)

    def _tensor(self, storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> TensorRecord:
        sizes_are_sizes = (
            isinstance(shape, tuple) and isinstance(stride, tuple) and all(map(_is_size, (*shape, *stride)))
        )
        if not (isinstance(storage, _Storage) and _is_size(offset) and sizes_are_sizes and len(shape) == len(stride)):
            raise _RefusedError(f"expected a tensor with a shape and strides, got {clip((offset, shape, stride))}")
        if len(shape) > _MOST_DIMENSIONS or prod(shape) > storage.length:
            raise _RefusedError(
                f"damaged or forged: a tensor of shape {clip(list(shape))} in a storage of {storage.length} elements"
            )
        last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
        if prod(shape) and last >= storage.length:
            raise _RefusedError(f"damaged or forged: a tensor that ends at element {last} of {storage.length}")
        return TensorRecord(shape, storage.dtype, storage.key)

    def _parameter(self, data: Any, *_: Any) -> TensorRecord:
        if not isinstance(data, TensorRecord):
            raise _RefusedError(f"expected a parameter with a tensor, got {clip(data)}")
        return data


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62
