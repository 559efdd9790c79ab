"""Folders and files appear whole or not at all."""

import os
from pathlib import Path

import pytest

from llama_adapter_kernels.formats.files import clip, listed, new_folder, write_whole


def test_a_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        with new_folder(tmp_path / "a" / "b") as folder:
            (folder / "file").write_text("content")
            (folder / "file").chmod(0o600)
            assert not (tmp_path / "a" / "b").exists()
    finally:
        os.umask(before)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]
    assert (tmp_path / "a" / "b" / "file").read_text() == "content"
    assert (tmp_path / "a" / "b" / "file").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, SystemExit])
def test_an_interrupted_folder_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def fill() -> None:
        with new_folder(tmp_path / "new") as folder:
            (folder / "file").write_text("content")
            raise error

    with pytest.raises(error):
        fill()
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("kept")
    (tmp_path / "file").write_text("kept")
    for name in ("full", "file"):
        with (
            pytest.raises(FileExistsError, match="expected a new folder, there is something already"),
            new_folder(tmp_path / name),
        ):
            pass
    assert (tmp_path / "full" / "mine").read_text() == (tmp_path / "file").read_text() == "kept"
    (tmp_path / "empty").mkdir()
    with new_folder(tmp_path / "empty") as folder:
        (folder / "file").write_text("new")
    assert (tmp_path / "empty" / "file").read_text() == "new"


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_whole(tmp_path / "file", b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(tmp_path / "file", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"


def test_messages_stay_short_and_printable() -> None:
    assert clip("a\x1b[31m\nb") == "a?[31m?b"
    assert len(clip("x" * 10**6)) < 130
    assert listed(range(10)) == "0, 1, 2, 3, 4, 5, 6, 7 and 2 more"
    assert listed(range(10), every=True).endswith("8, 9")
