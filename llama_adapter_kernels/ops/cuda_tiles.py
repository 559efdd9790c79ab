"""Which of two tiles the CUDA forward kernel of head_dim 65 to 128 takes on a card: the one that won recorded races.

The record is cuda_tiles.json beside this file, written by `llama-adapter bench --device cuda --record-order`, one entry
for a compute capability. Without one the kernels decide by what fits: 64 keys where two such blocks share a multiprocessor,
else 32 (csrc/cuda/sm80/forward_choice.h says why). The two add up in different orders, so results of cards with different
winners differ in their last bits, as they do between cards anyway.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from llama_adapter_kernels.ops import cuda_library, record_file

RECORD = Path(__file__).parent / "cuda_tiles.json"
FORMAT, VERSION = "llama-adapter-kernels CUDA tiles", 1
KEYS = (64, 32)


@dataclass(frozen=True)
class Entry:
    """What races on one card say."""

    capability: str  # "8.0"
    keys: int  # of the faster tile
    ratio: float  # the other's time over the faster one's, geometric mean over the races
    races: int
    card: str
    recorded: str


def load(path: Path) -> dict[str, Entry]:
    """The recorded entries by compute capability.

    Raises:
        RecordError: the file is not a record of this version.
    """
    entries = record_file.load(path, FORMAT, VERSION, Entry)
    for entry in entries:
        if not isinstance(entry.capability, str) or not re.fullmatch(r"\d+\.\d", entry.capability):
            raise record_file.RecordError(f'{path}: expected a compute capability as "8.0", got {entry.capability!r}')
        if type(entry.keys) is not int or entry.keys not in KEYS:
            raise record_file.RecordError(f"{path}: expected {' or '.join(map(str, KEYS))} keys, got {entry.keys!r}")
    return {entry.capability: entry for entry in entries}


def save(entries: dict[str, Entry], path: Path) -> None:
    record_file.save(path, FORMAT, VERSION, (entries[capability] for capability in sorted(entries)))


def apply() -> str | None:
    """Tells the CUDA library what is recorded; returns why that failed, None on success."""
    try:
        for capability, entry in _recorded().items():
            major, minor = map(int, capability.split("."))
            cuda_library.choose_forward_keys((major, minor), entry.keys)
    except ValueError as error:
        return str(error)
    return None


@lru_cache(maxsize=1)
def _recorded() -> dict[str, Entry]:
    return load(RECORD)


def forget() -> None:
    """Reads the record again."""
    _recorded.cache_clear()


@contextmanager
def forward_keys(capability: tuple[int, int], keys: int) -> Iterator[None]:
    """Tiles of `keys` keys on devices of one compute capability, for all threads; afterwards what is recorded."""
    cuda_library.choose_forward_keys(capability, keys)
    try:
        yield
    finally:
        recorded = _recorded().get(f"{capability[0]}.{capability[1]}")
        cuda_library.choose_forward_keys(capability, 0 if recorded is None else recorded.keys)
