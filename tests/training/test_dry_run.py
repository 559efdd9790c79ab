"""A dry run: what it says is what the run then does, and nothing is written."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from llama_adapter_kernels.cli import app
from llama_adapter_kernels.models import load_model_and_tokenizer
from llama_adapter_kernels.training import dry_run
from llama_adapter_kernels.training.data import read_rows
from llama_adapter_kernels.training.dry_run import duration, packing_of, size
from llama_adapter_kernels.training.loop import plan_steps
from llama_adapter_kernels.training.memory import estimate_memory
from llama_adapter_kernels.training.preparation import attach
from llama_adapter_kernels.training.settings import Execution, Settings
from llama_adapter_kernels.training.tokens import tokenize
from tests.support.runs import QUIET, SHORT, run


def call(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["finetune", *map(str, arguments)])


def test_it_says_what_the_run_does(tiny_model: Path, rows_file: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    result = call(
        "--model", tiny_model, "--data", rows_file, "--output", tmp_path / "run", "--cpu", "--dry-run", "--epochs", 2,
        "--batch-size", 8, "--micro-batch-size", 4, "--eval-fraction", 0.2,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert sorted(tmp_path.iterdir()) == before
    outcome = run(tiny_model, rows_file, tmp_path / "run", replace(SHORT, eval_fraction=0.2))
    said = result.stdout
    assert "18 examples, " in said and "4 examples held out" in said
    assert f"steps     {outcome.step} of 8 examples" in said
    assert "packing   2 micro-batches a step" in said
    assert f"trainable {outcome.trainable_parameters:,} of {outcome.total_parameters:,}" in said
    assert re.search(r"memory    about [\d.]+ MiB \(weights [\d.]+ MiB, activations", said)
    assert re.search(r"time      about \d+ s, from one micro-batch of \d+ tokens in [\d.]+ s on cpu", said)


def test_a_dry_run_of_a_run_that_is_there(tiny_model: Path, rows_file: Path, tmp_path: Path) -> None:
    """It needs the word that the run would need, and leaves everything as it is."""
    run(tiny_model, rows_file, tmp_path / "run", replace(SHORT, max_steps=1))
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    arguments = ["--model", tiny_model, "--data", rows_file, "--output", tmp_path / "run", "--cpu", "--dry-run"]
    assert "exists and is not empty" in call(*arguments).stderr
    assert call(*arguments, "--overwrite").exit_code == 0
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_steps_of_tokens(tiny_model: Path, rows_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = load_model_and_tokenizer(str(tiny_model), torch.float32)
    examples = tokenize(read_rows(rows_file), tokenizer, 512)
    settings = Settings(tokens_per_step=512, epochs=2)
    execution = replace(QUIET, micro_batch_size=None, tokens_per_micro_batch=256)
    plan = plan_steps(examples, settings)
    packing = packing_of(plan, settings, execution, 256, 1)
    steps = [sum(len(examples[i]) for i in plan.step(number)) for number in range(plan.total_steps)]
    assert packing.tokens == sum(steps) == 2 * sum(map(len, examples))
    assert packing.largest <= 256
    assert packing.step_fill == pytest.approx(sum(steps[:-1]) / (512 * (len(steps) - 1)))
    attach(model, settings)
    text = dry_run.rehearse(model, examples, [], settings, execution)
    monkeypatch.setenv("WORLD_SIZE", "4")
    halves = dry_run.rehearse(model, examples, [], settings, replace(execution, shard=True))
    assert ("weights 0.9 MiB" in text, "weights 0.2 MiB" in halves) == (True, True)
    assert "micro-batches a step over 4 processes" in halves
    assert f"steps are {100 * packing.step_fill:.1f}% of the 512 tokens asked for" in text


@pytest.mark.parametrize("low", [False, True])
def test_one_micro_batch_is_timed_as_it_will_be_computed(tiny_model: Path, rows_file: Path, low: bool) -> None:
    model, tokenizer = load_model_and_tokenizer(str(tiny_model), torch.float32)
    examples = tokenize(read_rows(rows_file), tokenizer, 512)
    settings = Settings(batch_size=8, autocast=low)
    execution = Execution(micro_batch_size=4, on_cpu=True, memory="low" if low else "auto")
    adapter = attach(model, settings)
    plan = plan_steps(examples, settings)
    packing = packing_of(plan, settings, execution, 10**6, 1)
    seconds, tokens = dry_run.seconds_per_micro_batch(
        model, examples, plan, packing, settings, execution, torch.device("cpu")
    )
    assert seconds > 0
    assert 0 < tokens <= packing.largest
    assert all(parameter.grad is None for parameter in adapter.parameters())
    assert model.is_gradient_checkpointing == low


def test_a_compiled_model_is_compiled_before_it_is_timed(
    tiny_model: Path, rows_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = load_model_and_tokenizer(str(tiny_model), torch.float32)
    examples = tokenize(read_rows(rows_file), tokenizer, 512)
    settings, execution = Settings(batch_size=8), replace(QUIET, compile=True)
    attach(model, settings)
    plan = plan_steps(examples, settings)
    asked: list[int] = []
    monkeypatch.setattr(dry_run, "compiled", lambda network, longest: asked.append(longest) or longest)
    packing = packing_of(plan, settings, execution, 10**6, 1)
    assert dry_run.seconds_per_micro_batch(model, examples, plan, packing, settings, execution, torch.device("cpu"))
    assert asked == [plan.longest]


def test_memory_by_part(tiny_model: Path) -> None:
    model, _ = load_model_and_tokenizer(str(tiny_model), torch.bfloat16)
    adapter = attach(model, Settings())
    found = estimate_memory(model, 1, 1000, torch.device("cpu"))
    assert found.weights == 2 * sum(p.numel() for p in model.parameters() if not p.requires_grad)
    assert found.trained == 4 * 4 * adapter.num_parameters()
    assert found.total == found.weights + found.activations + found.logits + found.trained
    assert estimate_memory(model, 1, 2000, torch.device("cpu")).activations == 2 * found.activations
    assert found.available > found.weights


def test_words_for_sizes_and_times() -> None:
    assert (size(3 * 2**20), size(2.5 * 2**30)) == ("3.0 MiB", "2.50 GiB")
    assert (duration(12), duration(600), duration(3 * 3600)) == ("about 12 s", "about 10 min", "about 3.0 h")
