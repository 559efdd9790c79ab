"""Packed sequences share tiles of the CUDA kernels, but not what is not finite in one of them."""

from dataclasses import replace
from types import ModuleType

import pytest
import torch
from torch import Tensor

from llama_adapter_kernels.testing import Problem, make_problem
from tests.cuda.test_cuda_edges import SMALL, everything, int32
from tests.support.emulated import EmulatedProblem

LENGTHS = ((40, 40), (30, 30), (3, 3), (75, 75), (10, 10))
BAD = 3  # crosses a tile of keys and one of rows, and has neighbours in both
ROWS = slice(73, 148)  # its tokens


def poisoned(problem: Problem, which: str, value: float) -> None:
    tensor = problem.doutput if which == "doutput" else problem.tensors[which]
    assert tensor is not None
    tensor.data[ROWS.start, :, 3] = value
    tensor.data[ROWS.stop - 1, :, 5] = value


def neighbours(tensor: Tensor) -> Tensor:
    return torch.cat([tensor[: ROWS.start], tensor[ROWS.stop :]])


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("which", ["query", "key", "value", "doutput"])
@pytest.mark.parametrize(
    ("dtype", "case"),
    [
        (torch.bfloat16, replace(SMALL, heads_q=2, heads_kv=2)),
        (torch.bfloat16, replace(SMALL, heads_q=2, heads_kv=1, prefix_length=20, is_causal=False)),
        (torch.float16, replace(SMALL, heads_q=1, heads_kv=1, head_dim=128)),
        (torch.float32, replace(SMALL, heads_q=2, heads_kv=1)),
    ],
    ids=["own heads", "a group, long prefix, not causal", "head_dim 128", "float32"],
)
def test_a_sequence_keeps_it_to_itself(
    emulator: ModuleType, dtype: torch.dtype, case: object, which: str, value: float
) -> None:
    problem = make_problem(replace(case, lengths=LENGTHS), dtype)  # type: ignore[type-var]
    clean = everything(emulator, problem)
    poisoned(problem, which, value)
    results = everything(emulator, problem)
    bad = ["output", "dquery", "dkey", "dvalue"] if which != "doutput" else ["dquery", "dkey", "dvalue"]
    for name in ("output", "dquery", "dkey", "dvalue"):
        expected, result = neighbours(clean[name]), neighbours(results[name])
        assert result.isfinite().all(), name
        # What the tile is computed again for may be added in another order.
        torch.testing.assert_close(result, expected, rtol=2e-2 if dtype != torch.float32 else 1e-4, atol=1e-3)
    assert any(not results[name][ROWS].isfinite().all() for name in bad), "else this test shows nothing"
    torch.testing.assert_close(neighbours(results["logsumexp"].T), neighbours(clean["logsumexp"].T))


def test_a_tile_is_computed_again_once_for_each_of_its_sequences(emulator: ModuleType) -> None:
    """Three of them in one tile of queries and one of keys: three passes more, not one for each row."""
    problem = make_problem(
        replace(SMALL, heads_q=1, heads_kv=1, lengths=((20, 20), (17, 17), (19, 19))), torch.bfloat16
    )
    counts = []
    for value in (1.0, torch.nan):
        tensor = problem.tensors["value"]
        assert tensor is not None
        tensor.data[25] = value
        for function in ("forward", "backward"):
            run = EmulatedProblem(emulator, problem)
            run.forward()
            emulator.counts()
            getattr(run, function)()
            counts.append(emulator.counts()["mma"])
    assert 1 < counts[2] / counts[0] <= 4
    assert 1 < counts[3] / counts[1] <= 5, "nor is a pair carried on then, which is one more"


def test_rows_that_see_few_keys(emulator: ModuleType) -> None:
    """Their statistics come from the keys again, sixteen rows at a time."""
    problem = make_problem(replace(SMALL, lengths=((2, 2), (3, 3), (4, 4))), torch.bfloat16)
    clean = everything(emulator, problem)
    for which in ("key", "value"):
        tensor = problem.tensors[which]
        assert tensor is not None
        tensor.data[2:5] = torch.nan
    results = everything(emulator, problem)
    for name in ("output", "dquery", "dkey", "dvalue"):
        for rows in (slice(0, 2), slice(5, 9)):
            torch.testing.assert_close(results[name][rows], clean[name][rows], rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("which", ["query", "key", "value"])
def test_the_last_sequence_of_a_tile_may_be_one_token(emulator: ModuleType, which: str) -> None:
    problem = make_problem(replace(SMALL, lengths=((20, 20), (1, 1))), torch.bfloat16)
    clean = everything(emulator, problem)
    tensor = problem.tensors[which]
    assert tensor is not None
    tensor.data[5] = torch.nan
    results = everything(emulator, problem)
    for name in ("output", "dquery", "dkey", "dvalue"):
        torch.testing.assert_close(results[name][20:], clean[name][20:], rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("which", ["key", "value"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("heads", [1, 2], ids=["own heads", "a group"])
@pytest.mark.parametrize("queries", [8, 0], ids=["queries", "no query"])
def test_the_last_sequence_of_the_only_tile(
    emulator: ModuleType, queries: int, heads: int, dtype: torch.dtype, which: str, value: float
) -> None:
    """Parts go from the last sequence to the first: what a block keeps of its own pair is then that of the first alone.

    Where the last has no query, no statistic tells of it: dQ alone, 0 x NaN, is computed again, and dK and dV have to be
    right although what is kept of dQ's last part lacks the keys of the others.
    """
    lengths = ((9, 9), (7, 7), (queries, 8))
    problem = make_problem(replace(SMALL, heads_q=heads, heads_kv=1, lengths=lengths), dtype)
    clean = everything(emulator, problem)
    tensor = problem.tensors[which]
    assert tensor is not None
    tensor.data[18:22, :, 3] = value
    results = everything(emulator, problem)
    for name in ("output", "dquery", "dkey", "dvalue"):
        # What the tile is computed again for may be added in another order.
        tolerance = 2e-2 if dtype != torch.float32 else 1e-4
        torch.testing.assert_close(results[name][:16], clean[name][:16], rtol=tolerance, atol=1e-3)
    torch.testing.assert_close(results["logsumexp"][:, :16], clean["logsumexp"][:, :16])
    if queries > 0:  # the last query sees every key
        for name in ("output", "dquery"):
            assert not results[name][-1].isfinite().all(), "else this test shows nothing"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_an_infinite_key_that_weighs_nothing(emulator: ModuleType, dtype: torch.dtype) -> None:
    """A score of -inf leaves output and statistics finite, so that dQ alone, 0 x inf, tells of the key."""
    problem = make_problem(replace(SMALL, heads_q=1, heads_kv=1, lengths=((9, 9), (7, 7), (8, 8))), dtype)
    query, key = problem.tensors["query"], problem.tensors["key"]
    assert query is not None
    assert key is not None
    query.data[16:, :, 3] = -query.data[16:, :, 3].abs() - 0.1
    clean = everything(emulator, problem)
    key.data[20, :, 3] = torch.inf
    results = everything(emulator, problem)
    assert results["output"].isfinite().all()
    assert results["dquery"][20:, :, 3].isnan().all(), "else this test shows nothing"
    for name in ("output", "dquery", "dkey", "dvalue"):
        tolerance = 2e-2 if dtype != torch.float32 else 1e-4
        torch.testing.assert_close(results[name][:16], clean[name][:16], rtol=tolerance, atol=1e-3)


@pytest.mark.parametrize("offsets", [(0, 30, 20, 50), (0, 60, 10, 10), (5, 5, 5, 5), (9, 20, 40, 60)], ids=str)
def test_offsets_that_lie_are_no_endless_loop(emulator: ModuleType, offsets: tuple[int, ...]) -> None:
    problem = make_problem(replace(SMALL, lengths=((20, 20), (20, 20), (20, 20))), torch.bfloat16)
    for which in ("cu_seqlens_q", "cu_seqlens_k"):
        problem.arguments[which] = int32(*offsets)
    tensor = problem.tensors["value"]
    assert tensor is not None
    tensor.data[25] = torch.nan
    everything(emulator, problem)
