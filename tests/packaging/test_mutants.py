"""The faults that `make mutants-cpu` and `make mutants-cuda` put into the kernels still find their place in the sources."""

import re
from pathlib import Path
from types import ModuleType

import pytest

from tests.mutants import cpu, cuda
from tests.mutants.schemata import schemata, without_comments

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("kernels", [cpu, cuda], ids=["cpu", "cuda"])
def test_what_is_added_and_what_is_explained(kernels: ModuleType) -> None:
    mutants = kernels.changed_sources()[1]
    added = [mutant for mutant in mutants if mutant.kind == "added"]
    assert len(added) == len(kernels.ADDED) == len({(fault.file, fault.name) for fault in kernels.ADDED})
    assert kernels.EXPLAINED.keys() - {mutant.name for mutant in mutants} == set()
    assert all(kernels.EXPLAINED.values())


KERNEL = """// A kernel: a < b in a comment is none.
#pragma once
template <class T, int kRows>
__device__ void kernel(T* to, const int (&there)[2], int rows) {
  static_assert(kRows > 4 && kRows < 64);
  constexpr int kHalf = kRows - 1 > 8 ? 8 : 4;
  for (int i = 0; i < kRows / 2; ++i) copy<kRows - 1>(to);
  commit_async_copies();
  ptx::wait_async_copies<1>();
  __syncthreads();  // it is there
  const int last = lower(rows, there[0] - 1);
  if constexpr (kRows > 8) return;
  if (rows < last && there[1] != 0) sum += -x;
  const float y = rows >= 2 ? static_cast<float>(last) : 0.0f;
}
"""


def test_all_mutants_of_a_kernel() -> None:
    """Nothing that has to be constant when it is compiled, and no loop that is unrolled."""
    changed, mutants = schemata(KERNEL, "kernel.h", 7)
    assert [mutant.number for mutant in mutants] == list(range(7, 7 + len(mutants)))
    assert {(mutant.line, mutant.kind, mutant.original, mutant.instead) for mutant in mutants} == {
        (8, "commit", "commit_async_copies()", "(void)0"),
        (9, "wait", "ptx::wait_async_copies<1>()", "(void)0"),
        (9, "wait", "ptx::wait_async_copies<1>()", "ptx::wait_async_copies<(1) + 1>()"),
        (10, "barrier", "__syncthreads()", "(void)0"),
        (11, "clip", "lower(rows, there[0] - 1)", "rows"),
        (11, "clip", "lower(rows, there[0] - 1)", "there[0] - 1"),
        (11, "sign", "there[0] - 1", "there[0] + 1"),
        (13, "condition", "rows < last && there[1] != 0", "true"),
        (13, "condition", "rows < last && there[1] != 0", "false"),
        (13, "mask", "rows < last && there[1] != 0", "rows < last"),
        (13, "mask", "rows < last && there[1] != 0", "there[1] != 0"),
        (13, "comparison", "rows < last", "rows <= last"),
        (13, "comparison", "there[1] != 0", "there[1] == 0"),
        (13, "sign", "sum += -x", "sum -= -x"),
        (13, "sign", "-x", "x"),
        (14, "comparison", "rows >= 2", "rows > 2"),
        (14, "choice", "rows >= 2 ? static_cast<float>(last) : 0.0f", "static_cast<float>(last)"),
        (14, "choice", "rows >= 2 ? static_cast<float>(last) : 0.0f", "0.0f"),
    }
    without = re.sub(r"bool(?=\()", "", changed)
    without = re.sub(r"lak_mutant\(\d+\) \? \((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\) : ", "", without)
    assert "lak_mutant" not in without
    assert re.sub(r"[\s()]", "", without) == re.sub(r"[\s()]", "", KERNEL), "without a fault it is the same"


def test_every_barrier_and_every_copy_is_among_the_mutants_of_cuda() -> None:
    mutants = cuda.changed_sources()[1]
    sources = [without_comments(path.read_text()) for path in (ROOT / "csrc/cuda/sm80").rglob("*.h")]
    for call, kind in (
        (r"__syncthreads\(|__syncthreads_or\(|__syncwarp\(", "barrier"),
        (r"wait_async_copies<", "wait"),
        (r"commit_async_copies\(", "commit"),
    ):
        calls = sum(len(re.findall(call, source)) for source in sources)
        places = {(mutant.file, mutant.line, mutant.original) for mutant in mutants if mutant.kind == kind}
        assert len(places) == calls > 20, kind
