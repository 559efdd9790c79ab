"""Packed fine-tuning batches, counted: blocks with work, rows of tiles in use, bytes of global memory."""

import pytest

from tests.support import triton_packed
from tests.support.child_process import RunInChild


@pytest.mark.parametrize("card", ["sm80", "sm86", "sm90", "sm100"])
def test_tiles_of_a_packed_batch_are_full(card: str) -> None:
    """Alpaca's lengths, 8192 tokens: at least 97% of the rows of all launched tiles are tokens (a tile for each sequence
    of the longest's length, as before: 30%)."""
    for kernel, used in triton_packed.rows_in_use(card, 8192).items():
        assert used >= 0.97, (kernel, used)


def test_work_and_traffic_of_a_packed_batch(interpreted: RunInChild) -> None:
    """N is one [T, H, D] tensor. Beside what kernels ask for it is counted what a cache of 1 MiB has to fetch for them,
    an H100 has 50: forward reads Q, K, V and writes O (4 N); backward reads and writes eight tensors (8 N), and Q, dO once
    more for the rows' statistics. What they ask for grows as blocks shrink: those that won the race on an H200 have 64 rows
    and keys (former blocks of 128: 18 N)."""
    counts = interpreted(triton_packed.count, 1024)
    forward, rows, words = (counts[f"{name}_kernel"] for name in ("forward", "backward_rows", "backward_words"))
    assert all(kernel["with_work"] >= 0.97 for kernel in (forward, rows, words)), counts
    assert forward["fetched"] <= 4.2, forward
    backward = [kernel for name, kernel in counts.items() if name.startswith("backward")]
    assert sum(kernel["fetched"] for kernel in backward) <= 11, backward
    assert forward["asked"] <= 5.5
    assert sum(kernel["asked"] for kernel in backward) <= 19.5
