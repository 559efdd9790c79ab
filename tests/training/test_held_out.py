"""What is held out: measured exactly, never trained on; the best adapter is what is saved; stopping early, and resuming."""

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from llama_adapter_kernels.errors import UserError
from llama_adapter_kernels.models import load_model_and_tokenizer
from llama_adapter_kernels.training import finetune
from llama_adapter_kernels.training.callbacks import read_csv_log
from llama_adapter_kernels.training.checkpoints import checkpoints, step_of
from llama_adapter_kernels.training.data import read_rows
from llama_adapter_kernels.training.held_out import Best, HeldOut, batches_of, split_off
from llama_adapter_kernels.training.run_folder import CSV_FILE, EVAL_FILE
from llama_adapter_kernels.training.tokens import Example, tokenize
from tests.support.kills import KillAfter, Killed
from tests.support.runs import QUIET, SHORT, run, weights

SETTINGS = replace(SHORT, epochs=4, eval_steps=2, eval_fraction=0.25)
EXECUTION = replace(QUIET, keep_checkpoints=1)


def examples(count: int) -> list[Example]:
    return [Example(tuple(range(3, 8 + i)), 4) for i in range(count)]


def test_splitting_off_is_exact_random_and_repeatable() -> None:
    everything = examples(20)
    kept, held = split_off(everything, 0.25, seed=0)
    assert len(held) == 5
    assert sorted(map(len, kept + held)) == sorted(map(len, everything))
    assert split_off(everything, 0.25, seed=0) == (kept, held)
    assert split_off(everything, 0.25, seed=1)[1] != held
    assert [len(part) for part in split_off(everything[:2], 0.001, 0)] == [1, 1]
    assert [len(part) for part in split_off(everything[:2], 0.999, 0)] == [1, 1]


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_every_held_out_example_is_measured_once(processes: int) -> None:
    everything = examples(11)
    batches = batches_of(everything, 30, processes)
    assert len(batches) % processes == 0
    assert all(len(batch) == 1 or sum(map(len, batch)) <= 30 for batch in batches)
    live = [example for batch in batches for example in batch if example.prompt_length < len(example)]
    assert sorted(live, key=len) == everything


def test_the_loss_is_that_of_each_example_alone(tiny_model: Path, rows_file: Path) -> None:
    model, tokenizer = load_model_and_tokenizer(str(tiny_model), torch.float32)
    found = tokenize(read_rows(rows_file), tokenizer, 512)
    total, count = 0.0, 0
    with torch.no_grad():
        for example in found:
            logits = model(torch.tensor([example.tokens])).logits[0].double().log_softmax(-1)
            for place in range(example.prompt_length, len(example)):
                total, count = total - float(logits[place - 1, example.tokens[place]]), count + 1
    sums = sum(HeldOut(found, 200, rank, 2).sums(model, torch.device("cpu")) for rank in range(2))
    assert int(sums[1]) == count
    assert float(sums[0]) == pytest.approx(total, rel=1e-5)


def test_the_best_adapter_is_saved_and_its_checkpoint_kept(
    tiny_model: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The measured losses are made up, so that step 4 is the best of five."""
    made_up = iter([5.0, 3.0, 4.0, float("nan"), 3.5, 9.0])

    def sums(*_: Any) -> torch.Tensor:
        return torch.tensor([next(made_up), 1.0], dtype=torch.float64)

    monkeypatch.setattr(HeldOut, "sums", sums)
    outcome = run(tiny_model, rows_file, tmp_path / "run", SETTINGS, execution=EXECUTION)
    assert (outcome.finished, outcome.best_step, outcome.held_out_losses[4]) == (True, 4, 3.0)
    assert [step_of(path) for path in checkpoints(tmp_path / "run")] == [4, outcome.step]
    for name, tensor in weights(tmp_path / "run" / "checkpoint-4").items():
        torch.testing.assert_close(weights(tmp_path / "run")[name], tensor, rtol=0, atol=0)
    rows = (tmp_path / "run" / EVAL_FILE).read_text().splitlines()
    assert rows[0] == "step,epoch,eval_loss"
    assert [row.split(",")[0] for row in rows[1:]] == ["2", "4", "6", "8", "10", "12"][: len(rows) - 1]
    assert not {path.name for path in (tmp_path / "run").iterdir()} & {"optimizer.pt", "manifest.json"}


def test_stopping_early_and_staying_stopped(
    tiny_model: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up = iter([5.0, 6.0, 7.0])
    monkeypatch.setattr(HeldOut, "sums", lambda *_: torch.tensor([next(made_up), 1.0], dtype=torch.float64))
    settings = replace(SETTINGS, early_stopping=2)
    outcome = run(tiny_model, rows_file, tmp_path / "run", settings, execution=EXECUTION)
    assert (outcome.finished, outcome.step, outcome.best_step) == (True, 6, 2)
    again = run(tiny_model, rows_file, tmp_path / "run", settings, execution=EXECUTION, resume=True)
    assert (again.finished, again.step, again.best_step) == (True, 6, 2)
    assert again.held_out_losses == outcome.held_out_losses


def test_a_killed_run_remembers_its_best(tiny_model: Path, rows_file: Path, tmp_path: Path) -> None:
    expected = run(tiny_model, rows_file, tmp_path / "whole", SETTINGS, execution=EXECUTION)
    with pytest.MonkeyPatch.context() as patch:
        train = finetune.train
        patch.setattr(finetune, "train", lambda *a, **k: train(*a, **k, callbacks=[KillAfter(7)]))
        with pytest.raises(Killed):
            run(tiny_model, rows_file, tmp_path / "cut", SETTINGS, execution=EXECUTION)
    outcome = run(tiny_model, rows_file, tmp_path / "cut", SETTINGS, execution=EXECUTION, resume=True)
    assert outcome.held_out_losses == expected.held_out_losses
    assert outcome.best_step == expected.best_step
    for name in (CSV_FILE, EVAL_FILE):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    for name, tensor in weights(tmp_path / "whole").items():
        torch.testing.assert_close(weights(tmp_path / "cut")[name], tensor, rtol=0, atol=0)


def test_data_of_its_own(tiny_model: Path, rows_file: Path, tmp_path: Path) -> None:
    rows = json.loads(rows_file.read_text())
    (tmp_path / "held.json").write_text(json.dumps(rows[:5]))
    settings = replace(SHORT, epochs=1)
    outcome = run(tiny_model, rows_file, tmp_path / "run", settings, eval_data=tmp_path / "held.json")
    assert list(outcome.held_out_losses) == [3]
    assert read_csv_log(tmp_path / "run" / EVAL_FILE)[0]["eval_loss"] == outcome.held_out_losses[3]
    (tmp_path / "held.json").write_text(json.dumps(rows[:6]))
    with pytest.raises(UserError, match="the held-out data changed"):
        run(tiny_model, rows_file, tmp_path / "run", settings, eval_data=tmp_path / "held.json", resume=True)


@pytest.mark.parametrize(
    ("settings", "more", "said"),
    [
        ({"eval_fraction": 0.1}, {"eval_data": [Path("x")]}, "--eval-data, --eval-fraction: expected one of them"),
        ({"eval_fraction": 0.0}, {}, "--eval-fraction: expected more than 0"),
        ({"eval_fraction": float("nan")}, {}, "--eval-fraction: expected more than 0"),
        ({"early_stopping": 1}, {}, "--early-stopping: expected --eval-data or --eval-fraction beside it"),
        ({"eval_steps": 1}, {}, "--eval-steps: expected --eval-data or --eval-fraction beside it"),
        ({"early_stopping": 0, "eval_fraction": 0.5}, {}, "--early-stopping: expected at least 1"),
        ({}, {"eval_data": Path("/absent.json")}, "/absent.json: No such file"),
    ],
)
def test_mistakes(
    tiny_model: Path, rows_file: Path, tmp_path: Path, settings: dict[str, Any], more: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        run(tiny_model, rows_file, tmp_path / "run", replace(SHORT, **settings), **more)
    assert not (tmp_path / "run").exists()


def test_a_best_checkpoint_that_could_not_be_saved(
    tiny_model: Path, rows_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The last adapter is better than none."""

    class LoseIt(TrainerCallback):
        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            for path in checkpoints(Path(args.output_dir)):
                shutil.rmtree(path)

    with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.WARNING):
        train = finetune.train
        patch.setattr(finetune, "train", lambda *a, **k: train(*a, **k, callbacks=[LoseIt()]))
        run(tiny_model, rows_file, tmp_path / "run", SETTINGS, execution=EXECUTION)
    assert weights(tmp_path / "run")
    assert "is gone: the last adapter is saved instead" in caplog.text


def test_best_needs_a_lower_loss() -> None:
    best = Best(1, patience=1)
    state, control = type("S", (), {"global_step": 3})(), type("C", (), {})()
    best.on_evaluate(None, state, control, metrics={"eval_loss": float("nan")})
    assert (best.step, best.worse, best.out_of_patience) == (0, 1, True)
