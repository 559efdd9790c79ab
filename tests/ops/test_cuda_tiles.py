"""Which tile the CUDA forward kernel takes: from races to the record, and from the record to the library."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from llama_adapter_kernels.bench import attention_peers, order_record
from llama_adapter_kernels.bench.results import Measurement, Results
from llama_adapter_kernels.ops import cuda_library, cuda_tiles
from llama_adapter_kernels.ops.record_file import RecordError
from llama_adapter_kernels.testing import Case, make_problem


@pytest.fixture(autouse=True)
def chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[tuple[tuple[int, int], int]]]:
    """A record of its own; what the library was told."""
    told: list[tuple[tuple[int, int], int]] = []
    monkeypatch.setattr(cuda_tiles, "RECORD", tmp_path / "cuda_tiles.json")
    monkeypatch.setattr(cuda_library, "choose_forward_keys", lambda *arguments: told.append(arguments))
    cuda_tiles.forget()
    yield told
    monkeypatch.undo()
    cuda_tiles.forget()


def races(*times: tuple[float | None, float | None]) -> Results:
    """(time of 64 keys, of 32) by race, on a card of compute capability 8.0."""
    found = Results({"gpu": "A card", "gpu_compute_capability": "8.0"}, {}, {}, "2026-01-01 00:00 UTC")
    for number, pair in enumerate(times):
        for keys, time in zip(cuda_tiles.KEYS, pair, strict=True):
            name = f"ours-cuda-{keys}-keys"
            found.measurements.append(
                Measurement(
                    case=f"case{number}", title="", question="attention", mode="forward", dtype="bfloat16",
                    shape={"head_dim": 128}, sweep=None, peer=name, label=name, ours=True, prefix_length=10,
                    status="unavailable" if time is None else "timed", median=time,
                )
            )  # fmt: skip
    return found


def test_races_decide(chosen: list[tuple[tuple[int, int], int]]) -> None:
    """By the geometric mean; a race with one time alone says nothing."""
    (entry,) = order_record.record_tiles(races((1.0, 0.5), (1.0, 1.5), (9.0, None)), cuda_tiles.RECORD)
    assert (entry.capability, entry.keys, entry.races) == ("8.0", 32, 2)
    assert entry.ratio == pytest.approx((2 / 1.5) ** 0.5, abs=1e-4)
    assert cuda_tiles.apply() is None
    assert chosen == [((8, 0), 32)]
    order_record.record_tiles(races((1.0, 1.2)), cuda_tiles.RECORD)
    assert cuda_tiles.load(cuda_tiles.RECORD)["8.0"].keys == 64
    assert cuda_tiles.apply() is None
    assert chosen[1:] == [((8, 0), 64)]


def test_no_race_records_nothing(chosen: list[tuple[tuple[int, int], int]]) -> None:
    assert order_record.record_tiles(races((None, 1.0)), cuda_tiles.RECORD) == []
    assert not cuda_tiles.RECORD.exists()
    assert cuda_tiles.apply() is None
    assert chosen == []


def test_a_choice_for_a_while(chosen: list[tuple[tuple[int, int], int]]) -> None:
    """Afterwards what is recorded for that card, or the library's default."""
    order_record.record_tiles(races((1.0, 0.5)), cuda_tiles.RECORD)
    with pytest.raises(KeyError), cuda_tiles.forward_keys((8, 0), 64):
        raise KeyError
    with cuda_tiles.forward_keys((9, 0), 32):
        pass
    assert chosen == [((8, 0), 64), ((8, 0), 32), ((9, 0), 32), ((9, 0), 0)]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ('[{"capability": "8.0", "keys": 48, "ratio": 1, "races": 1, "card": "", "recorded": ""}]', "64 or 32 keys, got 48"),
        ('[{"capability": 8.0, "keys": 64, "ratio": 1, "races": 1, "card": "", "recorded": ""}]', 'as "8.0", got 8.0'),
        ('[{"capability": "8.0", "keys": 64.0, "ratio": 1, "races": 1, "card": "", "recorded": ""}]', "keys, got 64.0"),
        ('[{"keys": 64}]', "no llama-adapter-kernels CUDA tiles"),
        ("7", "no llama-adapter-kernels CUDA tiles"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_record(entries: str, message: str) -> None:
    """The library is not used then, and the reason says why."""
    cuda_tiles.RECORD.write_text(f'{{"format": "{cuda_tiles.FORMAT}", "version": 1, "entries": {entries}}}')
    with pytest.raises(RecordError, match=message):
        cuda_tiles.load(cuda_tiles.RECORD)
    assert message in (cuda_tiles.apply() or "")


def test_the_shipped_record_is_valid() -> None:
    cuda_tiles.load(Path(cuda_tiles.__file__).parent / "cuda_tiles.json")


@pytest.mark.skipif(not cuda_library.LIBRARY.exists(), reason="the CUDA library is not built")
def test_the_library_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    cuda_library.choose_forward_keys((8, 0), 32)
    cuda_library.choose_forward_keys((8, 0), 0)
    with pytest.raises(ValueError, match="expected 64, 32, or 0"):
        cuda_library.choose_forward_keys((8, 0), 16)
    with pytest.raises(ValueError, match=r"from 8\.0 on"):
        cuda_library.choose_forward_keys((7, 5), 64)


def test_contestants_say_where_they_are_not() -> None:
    problem = make_problem(Case(batch=1, heads_q=1, heads_kv=1, seq_q=4, seq_k=4, head_dim=128), torch.bfloat16)
    for peer in attention_peers.TILES:
        assert "runs on cuda, not on cpu" in (peer.reason(problem, False) or "")
