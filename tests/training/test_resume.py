"""Runs that go on: from the newest whole checkpoint, with the same data and weights, for longer, one at a time."""

import json
import logging
import os
import resource
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llama_adapter_kernels.errors import UserError
from llama_adapter_kernels.training import checkpoints, finetune
from llama_adapter_kernels.training.checkpoints import MANIFEST, last_whole_checkpoint, step_of
from llama_adapter_kernels.training.run_folder import CSV_FILE, RUN_FILE, claim
from tests.support.kills import KillAfter, Killed
from tests.support.runs import QUIET, SHORT, run, weights

LONG = replace(SHORT, epochs=4)  # 12 steps
# Saves at steps 5 and 10 and logs means of three steps: checkpoints come in the middle of them.
MEANS = replace(QUIET, log_steps=3)


@pytest.fixture(scope="module")
def whole(tiny_model: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("whole") / "run"
    run(tiny_model, rows_file, output, LONG, execution=replace(MEANS, keep_checkpoints=9))
    return output


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    """The finished run, to be damaged: checkpoints of steps 5, 10 and 12."""
    shutil.copytree(whole, tmp_path / "run")
    return tmp_path / "run"


def assert_same_result(output: Path, expected: Path) -> None:
    assert (output / CSV_FILE).read_bytes() == (expected / CSV_FILE).read_bytes()
    for name, tensor in weights(expected).items():
        torch.testing.assert_close(weights(output)[name], tensor, rtol=0, atol=0)


def test_a_killed_run_writes_the_log_of_an_unbroken_one(
    tiny_model: Path, rows_file: Path, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at step 9 with checkpoint 5: rows past step 5 are not kept, means over steps 4 to 6 are of all three."""
    output = tmp_path / "run"
    with monkeypatch.context() as patch:
        train = finetune.train
        patch.setattr(finetune, "train", lambda *a, **k: train(*a, **k, callbacks=[KillAfter(9)]))
        with pytest.raises(Killed):
            run(tiny_model, rows_file, output, LONG, execution=MEANS)
    lines = (output / CSV_FILE).read_text().splitlines()
    assert [line.partition(",")[0] for line in lines] == ["step", "1", "3", "6", "9"]
    assert step_of(last_whole_checkpoint(output)[0]) == 5
    (output / CSV_FILE).write_text("\n".join([*lines, "10,1.0,7.0,0.1,0.1", "11,1."]))
    run(tiny_model, rows_file, output, LONG, execution=MEANS, resume=True)
    assert_same_result(output, whole)
    assert [line.partition(",")[0] for line in (output / CSV_FILE).read_text().splitlines()][-1] == "12"


def remove_file(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def flip_a_byte(name: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content)

    return apply


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (remove_file("optimizer.pt"), "optimizer.pt is missing"),
        (remove_file("scheduler.pt"), "scheduler.pt is missing"),
        (remove_file("trainer_state.json"), "trainer_state.json is missing"),
        (remove_file("adapter.safetensors"), "adapter.safetensors is missing"),
        (remove_file(MANIFEST), f"{MANIFEST} is missing"),
        (flip_a_byte("optimizer.pt"), "optimizer.pt is not as it was saved"),
        (flip_a_byte("adapter.safetensors"), "adapter.safetensors is not as it was saved"),
        (lambda folder: (folder / MANIFEST).write_text("[" * 100_000), f"{MANIFEST} cannot be read"),
        (lambda folder: (folder / MANIFEST).write_text("[]"), f"{MANIFEST} cannot be read"),
        (lambda folder: os.truncate(folder / "rng_state.pth", 100), "rng_state.pth is not as it was saved"),
    ],
)
def test_a_broken_newest_checkpoint_is_passed_over(
    copy: Path,
    whole: Path,
    tiny_model: Path,
    rows_file: Path,
    caplog: pytest.LogCaptureFixture,
    damage: Callable[[Path], None],
    said: str,
) -> None:
    damage(copy / "checkpoint-12")
    (copy / "adapter.safetensors").unlink()
    with caplog.at_level(logging.WARNING, logger="llama_adapter_kernels"):
        run(tiny_model, rows_file, copy, LONG, execution=replace(MEANS, keep_checkpoints=9), resume=True)
    assert f"checkpoint-12 is incomplete ({said}): going on from {copy / 'checkpoint-10'}" in caplog.text
    assert_same_result(copy, whole)
    assert step_of(last_whole_checkpoint(copy)[0]) == 12


def test_a_broken_newer_checkpoint_never_counts_among_those_to_keep(
    copy: Path, tiny_model: Path, rows_file: Path
) -> None:
    """The only whole checkpoint must survive, although a broken one has the higher number."""
    (copy / "checkpoint-12" / "optimizer.pt").unlink()
    shutil.rmtree(copy / "checkpoint-10")
    execution = replace(MEANS, keep_checkpoints=1, save_steps=2)
    with pytest.MonkeyPatch.context() as patch:
        train = finetune.train
        patch.setattr(finetune, "train", lambda *a, **k: train(*a, **k, callbacks=[KillAfter(7)]))
        with pytest.raises(Killed):
            run(tiny_model, rows_file, copy, LONG, execution=execution, resume=True)
    assert step_of(last_whole_checkpoint(copy)[0]) == 6


def test_without_a_whole_checkpoint_a_run_begins_again(
    copy: Path, whole: Path, tiny_model: Path, rows_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for folder in copy.glob("checkpoint-*"):
        (folder / "scheduler.pt").unlink()
    with caplog.at_level(logging.WARNING, logger="llama_adapter_kernels"):
        run(tiny_model, rows_file, copy, LONG, execution=MEANS, resume=True)
    assert "starting from the beginning" in caplog.text
    assert_same_result(copy, whole)


def test_removing_a_checkpoint_is_never_seen_half_done(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(folder: Path, **_: Any) -> None:
        next(path for path in Path(folder).rglob("*") if path.is_file()).unlink()
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(
            checkpoints.shutil, "rmtree", lambda folder, **k: killed(folder) if Path(folder).exists() else None
        )
        with pytest.raises(Killed):
            checkpoints.remove(copy / "checkpoint-5")
    left = checkpoints.checkpoints(copy)
    assert [step_of(path) for path in left] == [10, 12]
    assert all(checkpoints.what_is_broken(path) is None for path in left)
    checkpoints.remove_leftovers(copy)
    assert not [path for path in copy.iterdir() if path.name.startswith(".")]


def test_a_disk_full_at_the_start_leaves_nothing_to_stumble_over(
    tiny_model: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = finetune.prepare_output
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def on_a_full_disk(*arguments: Any, **options: Any) -> None:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
            prepare(*arguments, **options)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(finetune, "prepare_output", on_a_full_disk)
    with pytest.raises(UserError, match="run: File too large"):
        run(tiny_model, rows_file, tmp_path / "run")
    assert not any((tmp_path / "run").iterdir())
    monkeypatch.undo()
    assert run(tiny_model, rows_file, tmp_path / "run", replace(SHORT, max_steps=1)).finished


@pytest.mark.parametrize("content", ["", "[]", "7", '{"settings": 3}', "[" * 100_000, "\xff"])
def test_a_run_file_that_cannot_be_read(copy: Path, tiny_model: Path, rows_file: Path, content: str) -> None:
    (copy / RUN_FILE).write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=r"run.json cannot be read: the run cannot go on, --overwrite starts it anew"):
        run(tiny_model, rows_file, copy, LONG, execution=MEANS, resume=True)


def test_one_process_at_a_time(tiny_model: Path, rows_file: Path, copy: Path, tmp_path: Path) -> None:
    with claim(copy):
        for flags in ({"resume": True}, {"overwrite": True}):
            with pytest.raises(UserError, match="another process is training into this folder"):
                run(tiny_model, rows_file, copy, LONG, execution=MEANS, **flags)
    with claim(tmp_path / "new"), pytest.raises(UserError, match="another process is training into this folder"):
        run(tiny_model, rows_file, tmp_path / "new")
    assert not any((tmp_path / "new").iterdir())


def test_a_folder_that_another_process_filled_meanwhile(
    tiny_model: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = finetune.load_model

    def slow(*arguments: Any) -> Any:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / RUN_FILE).write_text("{}")
        return load(*arguments)

    monkeypatch.setattr(finetune, "load_model", slow)
    with pytest.raises(UserError, match="exists and is not empty"):
        run(tiny_model, rows_file, tmp_path / "run")
    assert (tmp_path / "run" / RUN_FILE).read_text() == "{}"


def test_other_weights_at_the_same_path(copy: Path, tiny_model: Path, rows_file: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(tiny_model, moved)
    assert run(moved, rows_file, copy, LONG, execution=MEANS, resume=True).finished
    content = bytearray((moved / "model.safetensors").read_bytes())
    content[-7] ^= 4
    (moved / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"the base model's weights changed$"):
        run(moved, rows_file, copy, LONG, execution=MEANS, resume=True)


def test_other_text_of_the_same_length(copy: Path, tiny_model: Path, rows_file: Path, tmp_path: Path) -> None:
    rows = json.loads(rows_file.read_text())
    row = next(row for row in rows if len(set(row["output"].split())) > 3)
    row["output"] = " ".join(reversed(row["output"].rstrip(".").split())) + "."
    other = tmp_path / "rows.json"
    other.write_text(json.dumps(rows))
    assert rows != json.loads(rows_file.read_text())
    with pytest.raises(UserError, match=r"the data changed$"):
        run(tiny_model, other, copy, LONG, execution=MEANS, resume=True)


def test_a_finished_run_can_be_made_longer(copy: Path, tiny_model: Path, rows_file: Path) -> None:
    """From where it is, along the longer run's schedule: the shorter one's ends at a learning rate of 0."""
    before = (copy / CSV_FILE).read_text()
    longer = replace(LONG, epochs=6)
    outcome = run(tiny_model, rows_file, copy, longer, execution=replace(MEANS, log_steps=1), resume=True)
    assert (outcome.finished, outcome.step) == (True, 18)
    text = (copy / CSV_FILE).read_text()
    assert text.startswith(before)
    rates = {int(line.split(",")[0]): float(line.split(",")[3]) for line in text.splitlines()[1:]}
    # 6 steps of warm-up, then half a cosine over 12: step 13 is in its middle.
    assert rates[13] == pytest.approx(longer.learning_rate / 2)
    assert json.loads((copy / RUN_FILE).read_text())["settings"]["epochs"] == 6
    before = contents(copy)
    with pytest.raises(UserError, match="is at step 18 already, --epochs or --max-steps ask for 12"):
        run(tiny_model, rows_file, copy, LONG, execution=MEANS, resume=True)
    assert contents(copy) == before


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_resume_with_other_settings_lists_them_and_touches_nothing(
    copy: Path, tiny_model: Path, rows_file: Path
) -> None:
    other = replace(LONG, gate="identity", batch_size=4, seed=3)
    (copy / ".saving").mkdir()
    (copy / ".saving" / "leftover").write_text("of a killed process")
    before = contents(copy)
    said = "batch_size was 8, is 4; gate was tanh, is identity; seed was 0, is 3$"
    with pytest.raises(UserError, match=f"--resume needs the run's own settings, data and model: {said}"):
        run(tiny_model, rows_file, copy, other, execution=MEANS, resume=True)
    assert contents(copy) == before


def test_a_setting_that_an_earlier_release_did_not_have(copy: Path, tiny_model: Path, rows_file: Path) -> None:
    """Its default is what that release did."""
    noted = json.loads((copy / RUN_FILE).read_text())
    del noted["settings"]["autocast"], noted["settings"]["depths"]
    (copy / RUN_FILE).write_text(json.dumps(noted))
    assert run(tiny_model, rows_file, copy, LONG, execution=MEANS, resume=True).step == 12


def test_the_first_step_of_a_longer_run_learns(copy: Path, tiny_model: Path, rows_file: Path) -> None:
    before = weights(copy)
    run(tiny_model, rows_file, copy, replace(LONG, max_steps=13), execution=MEANS, resume=True)
    assert any(not torch.equal(tensor, before[name]) for name, tensor in weights(copy).items())
