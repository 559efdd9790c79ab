"""What the CUDA kernels execute: as much as recorded, and of matrix instructions as many as tiles have something to see.

What is done in vain costs time and changes no result, so that no other test would notice. A matrix instruction is a product
of 16 x 8 x 16.
"""

import json
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch

from llama_adapter_kernels.testing import Case
from tests.support.cuda_costs import DECODE, HALF, OTHERS, RECORD, WINDOW, costs_of, costs_of_dquery_alone, mask_of

FEW_KEYS = 16  # rows that see no more take their statistics from the keys again
Rows = list[list[int]]  # of each row the keys that its window has, in order


@dataclass(frozen=True)
class Visible:
    windows: Rows
    unmasked: Rows
    keys: int

    def hull(self, rows: range) -> tuple[int, int]:
        """The first key that one of the rows sees, and the one after the last."""
        seen = [key for row in rows for key in self.windows[min(row, len(self.windows) - 1)]]
        return (min(seen), max(seen) + 1) if seen else (0, 0)

    def rows_seeing(self, keys: range) -> tuple[int, int]:
        rows = [row for row, window in enumerate(self.windows) if any(key in keys for key in window)]
        return (min(rows), max(rows) + 1) if rows else (0, 0)


def visible(case: Case, mask: torch.Tensor | None, window: tuple[int, int] | None) -> Visible:
    lengths = case.lengths or ((case.seq_q, case.seq_k),)
    windows: Rows = []
    first = 0
    for queries, keys in lengths:
        begin, end = window or (0, keys)
        for row in range(queries):
            last = first + (row + end - queries + 1 if case.is_causal else end)
            windows.append(list(range(first + begin, max(first + begin, last))))
        first += keys
    allowed = [
        window if mask is None else [key for key in window if mask[row, key]] for row, window in enumerate(windows)
    ]
    return Visible(windows, allowed, first)


def tiles(begin: int, end: int, size: int) -> range:
    return range(begin // size, (end + size - 1) // size) if end > begin else range(0)


def of_forward(seen: Visible, small: bool, slot_tiles: int) -> int:
    """Blocks of four warps, of 32 rows each (with a mask of 16); tiles of 64 keys from the first that the block sees."""
    rows_of_warp = 16 if small else 32
    per_warp = rows_of_warp // 16
    count = 0
    for first in range(0, len(seen.windows), 4 * rows_of_warp):
        begin, end = seen.hull(range(first, first + 4 * rows_of_warp))
        for warp in range(4):
            first_row = first + warp * rows_of_warp
            low, high = seen.hull(range(first_row, first_row + rows_of_warp))
            steps = sum(at < high and at + 64 > low for at in range(begin, end, 64))
            count += steps * per_warp * (8 * 4 + 8 * 4)  # Q K^T, P V
            scores = 1 if slot_tiles == 1 else 2 * slot_tiles  # for their maximum, and again for their weights
            count += per_warp * (scores * 2 * 4 + slot_tiles * 8)  # the same of the prefix
    return count


def of_rows(seen: Visible, slot_tiles: int) -> int:
    """Tiles of 64 rows, 16 a warp: the prefix, and the words of rows that see few keys."""
    count = 0
    for first in range(0, (len(seen.windows) + 63) // 64 * 64, 16):
        # Of several tiles of slots all are there for the statistics, and each again in its launch.
        scores = 1 if slot_tiles == 1 else 2 * slot_tiles
        count += scores * 2 * 2 * 4  # Q Kp^T, dO Vp^T
        count += slot_tiles * 2 * 4 * 2  # a quarter of the columns of gate P_p^T dO and dS_p^T Q over the 64 rows
        rows = range(first, min(first + 16, len(seen.windows)))
        few = [row for row in rows if 0 < len(seen.unmasked[row]) <= FEW_KEYS]
        keys = [key for row in few for key in seen.windows[row]]
        if not keys:
            continue
        wanted = {key for row in few for key in seen.unmasked[row]}
        for at in range(min(keys), max(keys) + 1, 16):
            count += 2 * 2 * 4 if any(at <= key < at + 16 for key in wanted) else 0  # Q K^T, dO V^T
    return count


def of_words(seen: Visible, group: int, slot_tiles: int) -> int:
    """Tiles of 64 queries and the same 64 keys, for each query head of one kv head."""
    count = 0
    product = 4 * 8 * 4
    for tile in range((max(len(seen.windows), seen.keys) + 63) // 64):
        own = range(64 * tile, 64 * tile + 64)
        has_queries = own.start < len(seen.windows)
        keys = tiles(*seen.hull(range(own.start, min(own.stop, len(seen.windows)))), 64) if has_queries else range(0)
        rows = tiles(*seen.rows_seeing(own), 64)
        carried = group == 1 and tile in keys and tile in rows
        count += group * len(keys) * 3 * product  # Q K^T, dO V^T, dS K
        count += group * has_queries * slot_tiles * 4 * 8  # dS_p Kp
        count += group * len(rows) * 4 * product - carried * 2 * product  # Q K^T, dO V^T, dS^T Q, P^T dO
    return count


@pytest.mark.parametrize("name", [*HALF, *OTHERS, *DECODE])
def test_what_a_problem_costs(emulator: ModuleType, name: str) -> None:
    """As recorded: who changes it on purpose records it anew with python -m tests.support.cuda_costs."""
    costs = costs_of(emulator, name)
    assert costs == json.loads(RECORD.read_text())[name]
    if name not in HALF:
        return
    case = HALF[name]
    mask = mask_of(case) if case.mask == "bool" else None
    seen = visible(case, mask, WINDOW if case.window == "both" else None)
    slot_tiles = (case.prefix_length + 15) // 16
    assert costs["forward"]["mma"] == case.heads_q * of_forward(seen, mask is not None, slot_tiles)
    rows, words = of_rows(seen, slot_tiles), of_words(seen, case.heads_q // case.heads_kv, slot_tiles)
    assert costs["backward"]["mma"] == case.heads_q * rows + case.heads_kv * words


def test_what_one_gradient_costs(emulator: ModuleType) -> None:
    assert costs_of_dquery_alone(emulator) == json.loads(RECORD.read_text())["dQ alone"]
