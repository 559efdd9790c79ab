"""Tile sizes: one short table per kind of card. A search at the first call is there for who asks for it (tile_race.py).

An entry is (block_m query rows, block_n keys, warps, pipeline stages), chosen by phase, head_dim and whether elements
have 2 or 4 bytes. The tests compile entries ahead of time and check that nothing spills inside a loop and that a block
fits the card's shared memory; README.md has the figures.

Force other tiles with `use_tiles(forward=(64, 64, 4, 2))`, or LAK_TRITON_TILES="forward=64,64,4,2 decode=16,32,4,2".
"""

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

TILES_VARIABLE = "LAK_TRITON_TILES"

# Phases. `backward_rows` serves the kernels that are linear in the sequence (block_n is not used there); `backward_keys`
# and `backward_queries` are the two kinds of programs of one launch.
PHASES = ("forward", "backward_keys", "backward_queries", "backward_rows", "decode")

# Shared memory a block may use, in KiB, by family.
SHARED_MEMORY_KIB = {"sm80": 163, "sm86": 99, "sm90": 227, "sm100": 227}


class Tile(NamedTuple):
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# 16-bit elements: card, phase, then the head_dim up to which the entry serves. Numbers that surprise:
# - sm80, backward_keys: 32 query rows, because with 64 the two score tiles spill inside the loop.
# - sm86 differs from sm80 only where sm80's tile does not fit 99 KiB.
# - sm90, up to head_dim 128: chosen by a race on an H200 (README.md). Two small blocks on a multiprocessor, each with
#   barriers of its own, were faster there than one large one.
# - sm100, backward_keys: 128 keys per block, so that a matrix instruction has its 64 rows per warp group.
# - sm100, head_dim 128: narrower than sm90, because scores pass through registers on their way from tensor memory.
# - decode: 16 rows, the least a matrix instruction takes; queries are few, and the stages keep the cache coming.
_DECODE = {64: Tile(16, 128, 4, 3), 128: Tile(16, 64, 4, 3), 256: Tile(16, 32, 4, 3)}
_PREFIX = {128: Tile(64, 0, 4, 2), 256: Tile(32, 0, 4, 2)}
_HALF: dict[str, dict[str, dict[int, Tile]]] = {
    "sm80": {
        "forward": {64: Tile(128, 64, 4, 3), 128: Tile(128, 64, 8, 3), 256: Tile(64, 32, 8, 2)},
        "backward_keys": {128: Tile(32, 128, 8, 2), 256: Tile(16, 64, 8, 2)},
        "backward_queries": {64: Tile(128, 64, 8, 2), 128: Tile(128, 32, 8, 2), 256: Tile(64, 32, 8, 2)},
        "backward_rows": _PREFIX,
        "decode": _DECODE,
    },
    "sm86": {
        "forward": {64: Tile(128, 64, 4, 3), 128: Tile(128, 64, 8, 2), 256: Tile(64, 32, 8, 2)},
        "backward_keys": {128: Tile(32, 128, 8, 2), 256: Tile(16, 64, 8, 2)},
        "backward_queries": {64: Tile(128, 64, 8, 2), 128: Tile(128, 32, 8, 2), 256: Tile(64, 16, 8, 2)},
        "backward_rows": _PREFIX,
        "decode": _DECODE,
    },
    "sm90": {
        "forward": {64: Tile(128, 64, 4, 3), 128: Tile(128, 64, 8, 4), 256: Tile(128, 64, 8, 2)},
        "backward_keys": {64: Tile(128, 64, 4, 2), 128: Tile(64, 64, 4, 2), 256: Tile(16, 64, 8, 2)},
        "backward_queries": {64: Tile(64, 128, 4, 2), 128: Tile(64, 64, 4, 2), 256: Tile(64, 32, 8, 2)},
        "backward_rows": _PREFIX,
        "decode": _DECODE,
    },
    "sm100": {
        "forward": {64: Tile(128, 128, 8, 2), 128: Tile(128, 64, 8, 2), 256: Tile(128, 32, 8, 2)},
        "backward_keys": {128: Tile(64, 128, 8, 2), 256: Tile(32, 64, 8, 2)},
        "backward_queries": {128: Tile(128, 64, 8, 2), 256: Tile(64, 32, 8, 2)},
        "backward_rows": _PREFIX,
        "decode": _DECODE,
    },
}

# float32 in full precision has no matrix instruction: small tiles, because operands live in registers.
_SINGLE: dict[str, dict[int, Tile]] = {
    "forward": {128: Tile(32, 32, 4, 2), 256: Tile(16, 32, 8, 1)},
    "backward_keys": {128: Tile(16, 32, 4, 1), 256: Tile(16, 16, 4, 1)},
    "backward_queries": {64: Tile(32, 32, 4, 1), 128: Tile(32, 16, 4, 1), 256: Tile(16, 16, 4, 1)},
    "backward_rows": {128: Tile(32, 0, 4, 1), 256: Tile(16, 0, 4, 1)},
    "decode": {128: Tile(16, 32, 4, 2), 256: Tile(16, 16, 4, 2)},
}

# Packed sequences of about a hundred tokens: fewer keys at a time, of which fewer belong to a neighbour. Races on an H100.
_TOKENS: dict[str, dict[str, dict[int, Tile]]] = {
    "sm90": {
        "forward": {64: Tile(128, 64, 4, 3), 128: Tile(128, 32, 4, 4)},
        "backward_keys": {64: Tile(128, 64, 4, 2), 128: Tile(32, 64, 4, 2)},
    },
}

_forced: dict[str, Tile] = {}


def family(capability: tuple[int, int]) -> str:
    """The row of the table for a compute capability. Unknown newer cards get what fits anywhere: sm86."""
    if capability[0] == 8:
        return "sm80" if capability[1] in (0, 7) else "sm86"
    if capability[0] == 9:
        return "sm90"
    return "sm100" if capability[0] in (10, 11) else "sm86"


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a device; 8.0 stands for the interpreter."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)


def has_descriptors(device: torch.device) -> bool:
    """Whether the device loads tiles by tensor descriptors (the copy engine of compute capability 9.0)."""
    return capability(device) >= (9, 0)


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors; for the interpreter few, so that it does not run many tiny programs."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def table_entry(phase: str, dtype: torch.dtype, head_dim: int, card: str, tokens: bool = False) -> Tile:
    """tokens: a packed axis in full tiles."""
    tables = [_SINGLE[phase]] if dtype == torch.float32 else [_HALF[card][phase]]
    if tokens and dtype != torch.float32:
        tables.insert(0, _TOKENS.get(card, {}).get(phase, {}))
    return next(tile for entries in tables for limit, tile in entries.items() if head_dim <= limit)


def is_forced(*phases: str) -> bool:
    """Whether `use_tiles` or the environment names the tile of one of these phases."""
    chosen = {*_forced, *_from_environment(os.environ.get(TILES_VARIABLE, ""))}
    return not chosen.isdisjoint(phases)


def tile_for(phase: str, dtype: torch.dtype, head_dim: int, device: torch.device, tokens: bool = False) -> Tile:
    """The tile for one launch: forced by `use_tiles`, by the environment, or from the table."""
    forced = _forced.get(phase) or _from_environment(os.environ.get(TILES_VARIABLE, "")).get(phase)
    return forced or table_entry(phase, dtype, head_dim, family(capability(device)), tokens)


@functools.cache
def _from_environment(text: str) -> dict[str, Tile]:
    tiles = {}
    for item in text.split():
        phase, _, numbers = item.partition("=")
        tiles[phase] = _checked(phase, tuple(int(number) for number in numbers.split(",") if number.isdigit()))
    return tiles


def _checked(phase: str, numbers: tuple[int, ...]) -> Tile:
    if phase not in PHASES:
        raise ValueError(f"{TILES_VARIABLE}: expected a phase of {', '.join(PHASES)}, got {phase!r}")
    if len(numbers) != 4:
        raise ValueError(f"{TILES_VARIABLE}: expected {phase}=block_m,block_n,warps,stages, got {numbers}")
    tile = Tile(*numbers)
    if any(size < 16 or size & (size - 1) for size in tile[:2] if size or phase != "backward_rows"):
        raise ValueError(f"{TILES_VARIABLE}: expected powers of two from 16 as block sizes of {phase}, got {tile[:2]}")
    return tile


@contextmanager
def use_tiles(**tiles: tuple[int, int, int, int]) -> Iterator[None]:
    """Within the context the named phases use these tiles (block_m, block_n, warps, stages).

    Raises:
        ValueError: an unknown phase, or a block size that is not a power of two from 16.
    """
    previous = dict(_forced)
    _forced.update({phase: _checked(phase, tuple(numbers)) for phase, numbers in tiles.items()})
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(previous)
