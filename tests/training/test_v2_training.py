"""Fine-tuning with --v2: what is tuned besides prompts is trained, saved, resumed and used."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import llama_adapter_kernels as lak
from llama_adapter_kernels.cli import app
from llama_adapter_kernels.formats import native
from tests.support.runs import QUIET, SHORT, run, weights

V2 = replace(SHORT, v2=True, lora_rank=2, base_learning_rate=0.5, weight_decay=0.5)


def test_a_run_trains_resumes_and_generates(tiny_model: Path, rows_file: Path, tmp_path: Path) -> None:
    outcome = run(tiny_model, rows_file, tmp_path / "whole", V2)
    assert outcome.losses[6] < 0.95 * outcome.losses[1]
    saved = native.read(tmp_path / "whole")
    assert saved.config.tuning == lak.Tuning(lora_rank=2)
    assert sum(tensor.numel() for tensor in saved.tensors.values()) == outcome.trainable_parameters
    # A weight decay of 0.5 would have drawn these from 1 to 0; biases and norms do not decay either.
    for name, tensor in saved.tensors.items():
        if name.endswith((".scale", ".new_gate")):
            assert (tensor - 1).abs().mean() < 0.3, name
            assert not torch.equal(tensor, torch.ones_like(tensor)), name

    # The run is cut back to its first checkpoint and goes on from there.
    output = tmp_path / "cut"
    shutil.copytree(tmp_path / "whole", output)
    shutil.rmtree(output / "checkpoint-6")
    again = run(tiny_model, rows_file, output, V2, resume=True)
    assert again.losses == outcome.losses
    for name, tensor in weights(tmp_path / "whole").items():
        assert torch.equal(weights(output)[name], tensor), name

    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    tokens = torch.arange(4, 20)[None]
    plain = model(tokens).logits
    lak.load_adapter(model, output)
    assert (model(tokens).logits - plain).abs().max() > 0.1


def test_the_command_line_takes_it(tiny_model: Path, rows_file: Path, tmp_path: Path) -> None:
    common = ["--model", str(tiny_model), "--data", str(rows_file), "--output", str(tmp_path / "run"), "--cpu"]
    arguments = [
        "finetune",
        *common,
        "--v2",
        "--lora-rank",
        "3",
        "--max-steps",
        "1",
        "--no-tensorboard",
        "--no-progress-bar",
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert native.read(tmp_path / "run").config.tuning == lak.Tuning(lora_rank=3)
    result = CliRunner().invoke(
        app, ["finetune", *common[:4], "--output", str(tmp_path / "two"), "--v2", "--lora-rank", "-1"]
    )
    assert result.exit_code == 2
    assert "--lora-rank: expected at least 0, got -1" in result.output


@pytest.mark.parametrize("checkpointing", [False, True])
def test_losses_do_not_depend_on_how_the_run_is_carried_out(
    tiny_model: Path, rows_file: Path, tmp_path: Path, checkpointing: bool
) -> None:
    short = replace(V2, max_steps=2)
    expected = run(tiny_model, rows_file, tmp_path / "plain", short)
    execution = replace(QUIET, micro_batch_size=2, gradient_checkpointing=checkpointing)
    found = run(tiny_model, rows_file, tmp_path / "other", short, execution=execution)
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)
