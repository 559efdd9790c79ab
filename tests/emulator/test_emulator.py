"""The emulator itself: a kernel with a planted fault must be reported, its correct twin must not."""

from types import ModuleType

import pytest
import torch

SEEDS = range(6)  # every temper of the scheduler, twice


def run(emulator: ModuleType, name: str, seed: int) -> torch.Tensor:
    memory = torch.zeros(64)
    emulator.forget_memory()
    emulator.register_memory("out", memory.data_ptr(), 256, True)
    emulator.set_seed(seed)
    emulator.run_fault(name, memory.data_ptr())
    return memory


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("name", "reports"),
    [
        ("missing_barrier", "race in shared memory"),
        ("missing_second_barrier", "race in shared memory"),
        ("missing_warp_sync", "race in shared memory"),
        ("unwaited_copy", "before the wait for its cp.async"),
        ("abandoned_copy", "ends with a cp.async in flight"),
        ("uncommitted_copy", "ends with a cp.async in flight"),
        ("shared_off_by_one", "out of bounds: write of 4 bytes at offset 256 of 256 bytes of shared memory"),
        ("global_off_by_one", "write of 4 bytes of global memory, 256 bytes from the beginning of out"),
        ("misaligned_copy", "misaligned access of 16 bytes"),
        ("divergent_barrier", "divergent barrier: not every thread reaches it"),
        ("two_barriers", "divergent barrier: some threads wait at"),
        ("named_barrier_too_small", "threads disagree about how many take part"),
        ("producers_apart", "race in shared memory"),
        ("divergent_shuffle", "deadlock: every thread waits"),
        ("missing_global_barrier", "race in global memory: "),
        ("threads_write_the_same", "race in global memory: write after write of out"),
        ("blocks_write_the_same", "race in global memory: write of out"),
        ("blocks_read_what_others_write", "race in global memory: "),
        ("blocks_add_to_what_others_read", "race in global memory: "),
    ],
)
def test_planted_fault_is_reported(emulator: ModuleType, name: str, reports: str, seed: int) -> None:
    with pytest.raises(RuntimeError) as caught:
        run(emulator, name, seed)
    report = str(caught.value)
    assert reports in report
    assert "faults.cu:" in report, "the source line"
    assert "thread" in report
    assert "block (" in report
    assert "kernel" in report


@pytest.mark.parametrize("seed", SEEDS)
def test_correct_twins_are_not(emulator: ModuleType, seed: int) -> None:
    expected = (torch.arange(64) + 1.0) % 64
    assert torch.equal(run(emulator, "barrier", seed), expected)
    assert torch.equal(run(emulator, "global_barrier", seed), expected)
    assert torch.equal(run(emulator, "named_barriers", seed), expected)
    assert torch.equal(run(emulator, "named_producers", seed), expected)
    assert torch.equal(run(emulator, "waited_copy", seed), torch.ones(64))


@pytest.mark.parametrize("seed", SEEDS)
def test_blocks_are_in_flight_together(emulator: ModuleType, seed: int) -> None:
    """Two of them pass their barriers in turns, and may write side by side."""
    assert run(emulator, "blocks_take_turns", seed)[1] > 2
    assert torch.equal(run(emulator, "blocks_write_their_own", seed), torch.arange(64) % 2.0)


@pytest.mark.parametrize(("name", "error"), [("shared_memory_not_asked_for", 1), ("too_many_threads", 9)])
def test_launches_beyond_the_limits_fail(emulator: ModuleType, name: str, error: int) -> None:
    with pytest.raises(RuntimeError, match=f"launch: error {error}$"):
        run(emulator, name, 0)


@pytest.mark.parametrize(("name", "wavefronts"), [("stride_1", 1), ("stride_8", 8)])
def test_bank_conflicts_are_counted(emulator: ModuleType, name: str, wavefronts: int) -> None:
    emulator.counts()
    emulator.count_banks(True)
    run(emulator, name, 0)
    emulator.count_banks(False)
    counts = emulator.counts()
    assert (counts["wavefronts"], counts["bank_conflicts"]) == (wavefronts, wavefronts - 1)


def test_shared_memory_begins_as_nan(emulator: ModuleType) -> None:
    assert run(emulator, "uninitialised", 0).isnan().all()


def test_registers_begin_as_nan(emulator: ModuleType) -> None:
    assert run(emulator, "uninitialised_registers", 0).isnan().all()


def test_1024_threads_and_atomics(emulator: ModuleType) -> None:
    assert torch.equal(run(emulator, "many_threads", 0), torch.full((64,), 32.0))


def test_matrix_instructions(emulator: ModuleType) -> None:
    row_sums = torch.tensor([float(sum(row + k for k in range(16))) for row in range(16)])
    assert torch.equal(run(emulator, "matrix_round_trip", 0)[:16], row_sums)


def test_a_failed_launch_leaves_nothing_behind(emulator: ModuleType) -> None:
    with pytest.raises(RuntimeError, match="divergent"):
        run(emulator, "divergent_barrier", 0)
    assert torch.equal(run(emulator, "barrier", 0), (torch.arange(64) + 1.0) % 64)
