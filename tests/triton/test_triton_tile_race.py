"""Choosing tiles by a race: who wins, when there is none, what is kept on disk. Clock and card are made up."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llama_adapter_kernels.triton_kernels import tile_race, tuning
from llama_adapter_kernels.triton_kernels.tile_race import Kind, Tiles
from llama_adapter_kernels.triton_kernels.tuning import Tile

DEVICE = torch.device("cuda", 0)
KIND = Kind("forward", "bfloat16", 128, True, False, 1024)
DEFAULT: Tiles = (Tile(128, 128, 8, 2),)
FASTEST = tile_race.candidates("forward", torch.bfloat16, 128, "sm90")[1]


class Card:
    """Stands for a Hopper card: counts launches, and says that FASTEST is fastest."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.launched: list[Tiles] = []
        monkeypatch.setenv(tile_race.SWITCH, "1")
        monkeypatch.setenv(tile_race.FOLDER_VARIABLE, str(folder))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB")
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        monkeypatch.setattr(tile_race, "capability", lambda device: (9, 0))
        monkeypatch.setattr(tile_race, "milliseconds", self._time)
        tile_race._winners.cache_clear()

    def launch(self, tiles: Tiles) -> None:
        self.launched.append(tiles)

    def _time(self, call: Callable[[], None], device: torch.device) -> float:
        call()
        return 1.0 if self.launched[-1] == FASTEST else 2.0

    def choose(self, kind: Kind = KIND, is_forced: bool = False) -> Tiles:
        return tile_race.choose(kind, DEVICE, DEFAULT, is_forced, self.launch)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Card:
    return Card(monkeypatch, tmp_path / "tiles")


def test_the_fastest_wins_once_and_is_kept(card: Card, tmp_path: Path) -> None:
    assert card.choose() == FASTEST
    raced = len(card.launched)
    assert raced >= 2 * len(tile_race.candidates("forward", torch.bfloat16, 128, "sm90"))
    assert card.choose() == FASTEST
    tile_race._winners.cache_clear()  # another process
    assert card.choose() == FASTEST
    assert len(card.launched) == raced, "nothing was launched again"
    (file,) = (tmp_path / "tiles").iterdir()
    assert list(json.loads(file.read_text())) == [KIND.key]


def test_no_race(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forced tiles, deterministic algorithms, a graph being captured, the switch off, another device: the table's tile."""
    assert card.choose(is_forced=True) == DEFAULT
    torch.use_deterministic_algorithms(True)
    try:
        assert card.choose() == DEFAULT
    finally:
        torch.use_deterministic_algorithms(False)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert card.choose() == DEFAULT
    assert tile_race.choose(KIND, torch.device("cpu"), DEFAULT, False, card.launch) == DEFAULT
    monkeypatch.delenv(tile_race.SWITCH)
    assert card.choose() == DEFAULT
    assert card.launched == []


def test_a_tile_the_card_cannot_hold_is_out(card: Card) -> None:
    from triton.runtime.errors import OutOfResources

    def launch(tiles: Tiles) -> None:
        if tiles == FASTEST:
            raise OutOfResources(300_000, 232_448, "shared memory")
        card.launched.append(tiles)

    assert tile_race.choose(KIND, DEVICE, DEFAULT, False, launch) == DEFAULT


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", '{"forward": 3}', '{"forward": [[1, 2]]}', "\x00", "[" * 5000])
def test_a_file_that_cannot_be_read_counts_as_empty(card: Card, content: str) -> None:
    file = tile_race.cache_file(DEVICE)
    file.parent.mkdir(parents=True)
    file.write_text(content)
    assert card.choose() == FASTEST
    assert tile_race.load(file) == {KIND.key: FASTEST}
    assert list(file.parent.iterdir()) == [file], "no temporary file stays"


def test_a_folder_that_cannot_be_written_is_done_without(card: Card, tmp_path: Path) -> None:
    (tmp_path / "tiles").write_text("not a folder")
    assert card.choose() == FASTEST
    raced = len(card.launched)
    assert card.choose() == FASTEST
    assert len(card.launched) == raced


def test_winners_of_other_kinds_stay(card: Card) -> None:
    other = Kind("forward", "bfloat16", 64, True, False, 1024)
    card.choose()
    card.choose(other)
    assert set(tile_race.load(tile_race.cache_file(DEVICE))) == {KIND.key, other.key}


def test_the_file_belongs_to_card_versions_and_sources(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {tile_race.cache_file(DEVICE)}
    for target, name, value in (
        (torch.cuda, "get_device_name", lambda device: "NVIDIA A100"),
        (tile_race, "sources_digest", lambda: "changed"),
        (tile_race.importlib.metadata, "version", lambda name: "3.9.0"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, value)
            files.add(tile_race.cache_file(DEVICE))
    assert len(files) == 4


def test_owners_of_keys_and_queries_share_warps_and_tokens() -> None:
    """They are programs of one launch, and alternate where their blocks are of one size."""
    pairs = [
        tuple(tuning.table_entry(phase, dtype, head_dim, card) for phase in ("backward_keys", "backward_queries"))
        for card in tuning.SHARED_MEMORY_KIB
        for dtype in (torch.bfloat16, torch.float32)
        for head_dim in (64, 128, 256)
    ]
    pairs += [pair for card in tuning.SHARED_MEMORY_KIB for head_dim in (64, 128, 256)
              for pair in tile_race.candidates("backward_words", torch.bfloat16, head_dim, card)]  # fmt: skip
    for keys, queries in pairs:
        assert keys.num_warps == queries.num_warps
        assert keys.block_n == queries.block_m
