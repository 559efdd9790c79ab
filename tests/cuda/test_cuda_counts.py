"""What the CUDA kernels cost, counted by the emulator: blocks without work, bytes of global memory, matrix operands.

N is one [T, H, D] tensor. A byte counts once for each launch that reads or writes it: what memory moves where the cache
holds what the blocks in flight share, and nothing from launch to launch.
"""

from types import ModuleType

import pytest
import torch

from llama_adapter_kernels.bench.lengths import alpaca_lengths
from llama_adapter_kernels.testing import Case, Problem, make_problem
from tests.support.emulated import EmulatedProblem

TOKENS = 8192


def alpaca_lengths_of(tokens: int) -> tuple[tuple[int, int], ...]:
    """Sequences as they come, until the next would not fit."""
    lengths: list[tuple[int, int]] = []
    for length in alpaca_lengths(200):
        if sum(n for n, _ in lengths) + length > tokens:
            break
        lengths.append((length, length))
    return tuple(lengths)


def packed(heads: int, head_dim: int) -> Problem:
    case = Case(heads_q=heads, heads_kv=heads, head_dim=head_dim, lengths=alpaca_lengths_of(TOKENS))
    return make_problem(case, torch.bfloat16)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_packed_alpaca_batch(emulator: ModuleType, head_dim: int) -> None:
    """At 8192 tokens: at least 97% of the blocks have work and of their rows are used, forward 4.2 N and backward 11 N."""
    problem = packed(heads=1, head_dim=head_dim)
    query = problem.tensors["query"]
    assert query is not None
    tokens, size = query.shape[0], query.numel() * query.element_size()
    run = EmulatedProblem(emulator, problem)
    emulator.counts(), emulator.traffic(), emulator.blocks()

    run.forward()
    moved = emulator.traffic()
    assert sum(read + written for _, read, written in moved.values()) <= 4.2 * size
    ((launched, idle),) = emulator.blocks().values()
    assert idle <= 0.03 * launched
    assert tokens >= 0.97 * 128 * (launched - idle)

    run.backward()
    moved = emulator.traffic()
    # A block of the only head takes one tile of rows, so that there are blocks enough, and leaves a partial sum of the
    # prefix's gradients for it, which is written and read once. Of 32 heads a block takes sixteen tiles.
    partial = 2 * (partial_sums(run, heads=1) - partial_sums(run, heads=32) / 32)
    windows = 2 * 8 * tokens * 31 / 32  # the keys that a row sees: written and read once for all heads
    total = sum(read + written for _, read, written in moved.values()) - partial - windows
    assert total <= 11 * size, moved
    blocks = emulator.blocks()
    for kernel, (launched, idle) in blocks.items():
        assert idle <= 0.03 * launched, kernel
    launched, idle = blocks["backward_words_kernel"]
    assert tokens >= 0.97 * 64 * (launched - idle)
    assert emulator.counts()["reductions"] == 0, "no gradient depends on the order of blocks"


def partial_sums(run: EmulatedProblem, heads: int, **sizes: int) -> int:
    """Bytes of workspace that the gradients of a shared prefix take."""
    some = run.params["query"]
    params = run.params | {"heads_q": heads, "heads_kv": heads, "dquery": some, "dkey": some, "dvalue": some} | sizes
    without = run.emulator.backward_workspace({name: value for name, value in params.items() if name != "dgate"})
    return int(run.emulator.backward_workspace(params | {"dgate": some[0]})) - int(without)


def test_partial_sums_of_the_prefix(emulator: ModuleType) -> None:
    """One for a head and a thousand tokens: under 3 MB at B 64, T 8192, H 32, D 128, P 10."""
    case = Case(heads_q=1, heads_kv=1, head_dim=128, lengths=((16, 16), (16, 16)))
    run = EmulatedProblem(emulator, make_problem(case, torch.bfloat16))
    sizes = {"batch": 64, "total_q": 8192, "total_k": 8192, "seq_q": 512, "seq_k": 512}
    assert 0 < partial_sums(run, heads=32, **sizes) < 3e6


@pytest.mark.parametrize("head_dim", [64, 128])
def test_reductions_fill_whole_sectors(emulator: ModuleType, head_dim: int) -> None:
    case = Case(batch=1, heads_q=1, heads_kv=1, seq_q=128, seq_k=800, head_dim=head_dim, is_causal=False)
    run = EmulatedProblem(emulator, make_problem(case, torch.bfloat16))
    run.forward()
    emulator.counts()
    run.backward()
    counts = emulator.counts()
    assert counts["reductions"] == 8 * counts["reduction_sectors"], "8 floats a sector"
    assert counts["ldmatrix"] <= 0.48 * counts["mma"], "operands read from shared memory for each matrix product"


@pytest.mark.parametrize("head_dim", [64, 128])
def test_bank_conflicts(emulator: ModuleType, head_dim: int) -> None:
    """Tiles are permuted so that neither copies nor operands nor results of products meet in a bank."""
    case = Case(batch=1, heads_q=1, heads_kv=1, seq_q=70, seq_k=130, head_dim=head_dim, is_causal=False)
    run = EmulatedProblem(emulator, make_problem(case, torch.bfloat16))
    emulator.counts()
    emulator.count_banks(True)
    for launch in (run.forward, run.backward):
        launch()
        counts = emulator.counts()
        assert counts["bank_conflicts"] <= 0.02 * counts["wavefronts"], counts
    emulator.count_banks(False)


def test_no_block_more_than_there_are_tiles(emulator: ModuleType) -> None:
    """A row, or a key, less than whole tiles, none less, and one more."""
    for more, tiles in ((-1, 2), (0, 2), (1, 3)):
        rows = 128 + more
        case = Case(batch=1, heads_q=1, heads_kv=1, head_dim=64, seq_q=rows, seq_k=rows)
        run = EmulatedProblem(emulator, make_problem(case, torch.bfloat16))
        emulator.blocks()
        run.forward(), run.backward()
        blocks = emulator.blocks()
        sums = 10 * 64 // 128 + 1  # a thread for each element of the prefix's gradients, and one more for the gate
        assert blocks == {
            "forward_kernel": ((tiles + 1) // 2, 0), "backward_rows_kernel": (tiles, 0),
            "backward_sums_kernel": (sums, 0), "backward_words_kernel": (tiles, 0),
        }  # fmt: skip
        case = Case(batch=1, heads_q=1, heads_kv=1, head_dim=64, seq_q=rows // 2, seq_k=768 + rows)
        run = EmulatedProblem(emulator, make_problem(case, torch.bfloat16))
        run.forward()
        emulator.blocks()
        run.backward()
        blocks = emulator.blocks()
        assert blocks["backward_keys_kernel"] == ((768 + rows + 127) // 128, 0)
        assert blocks["convert_dquery_kernel"] == ((rows // 2 + 63) // 64, 0)
        case = Case(batch=1, heads_q=8, heads_kv=1, head_dim=64, seq_q=4, seq_k=512 + more)
        run = EmulatedProblem(emulator, make_problem(case, torch.bfloat16))
        run.decode()
        assert emulator.blocks() == {
            "decode_kernel": (2 * 2, 0),
            "combine_kernel": (8, 0),
        }  # 2 tiles of 16 rows, 2 splits


@pytest.mark.parametrize(("queries", "keys"), [(130, 70), (70, 130)])
def test_blocks_of_what_is_asked_for(emulator: ModuleType, queries: int, keys: int) -> None:
    """No launch for gradients that nobody wants."""
    case = Case(batch=1, heads_q=1, heads_kv=1, head_dim=64, seq_q=queries, seq_k=keys, prefix_length=33)
    run = EmulatedProblem(emulator, make_problem(case, torch.bfloat16))
    run.forward()
    rows = {"backward_rows_kernel": (3 * ((queries + 63) // 64), 0)}  # a launch for each 16 slots
    prefix = rows | {"backward_sums_kernel": ((33 * 64 + 1 + 127) // 128, 0)}
    of_queries, of_keys, of_both = (
        {"backward_words_kernel": ((count + 63) // 64, 0)} for count in (queries, keys, max(queries, keys))
    )
    emulator.blocks()
    for needs, expected in {
        (False, False, False): {},
        (False, False, True): prefix,
        (True, False, True): prefix | of_queries,
        (False, True, True): prefix | of_keys,
        (True, True, True): prefix | of_both,
        (True, False, False): rows | of_queries,
    }.items():
        for name in ("dquery", "dkey", "dvalue", "dprefix_key", "dprefix_value", "dgate"):
            run.params.pop(name, None)
        run.backward(*needs)
        assert emulator.blocks() == expected, needs


def test_blocks_beyond_the_end_of_a_sequence_are_idle(emulator: ModuleType) -> None:
    """Sequence by sequence. The second has 768 keys more: those of the first beyond its end do nothing."""
    packed = Case(heads_q=1, heads_kv=1, head_dim=64, lengths=((128, 128), (64, 896)), prefix="table")
    run = EmulatedProblem(emulator, make_problem(packed, torch.bfloat16))
    run.forward()
    run.backward(need_dprefix=False)
    blocks = emulator.blocks()
    assert blocks["forward_kernel"] == (2, 0)
    assert blocks["backward_keys_kernel"] == (14, 6)
    assert blocks["convert_dquery_kernel"] == (4, 1)
    packed = Case(heads_q=1, heads_kv=1, head_dim=64, lengths=((128, 128), (64, 64), (200, 200)), prefix="table")
    run = EmulatedProblem(emulator, make_problem(packed, torch.bfloat16))
    run.forward()
    run.backward(need_dprefix=False)
    blocks = emulator.blocks()
    assert blocks["forward_kernel"] == (6, 2)
    assert blocks["backward_words_kernel"][0] == 12
