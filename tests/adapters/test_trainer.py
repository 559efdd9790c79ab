"""transformers' Trainer: checkpoints hold the adapter alone, and nothing is dropped without a word."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import llama_adapter_kernels as lak
from tests.support.small_models import TOKENS, adapted

ROWS = [{"input_ids": row, "labels": row} for row in (TOKENS[0], TOKENS[0] + 5, TOKENS[0] + 9, TOKENS[0].flip(0))]


class AdapterTrainer(lak.AdapterTrainerMixin, Trainer):
    pass


def trainer(kind: type[Trainer], folder: Path, steps: int, **more: object) -> tuple[Trainer, nn.Module]:
    torch.manual_seed(3)
    model, _ = adapted()
    arguments = TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=2, learning_rate=0.01, save_steps=2, report_to=[],
        use_cpu=True, lr_scheduler_type="constant", logging_steps=1, disable_tqdm=True, **more,
    )  # fmt: skip
    return kind(model, arguments, train_dataset=ROWS, eval_dataset=ROWS), model


def prompts(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in lak.attached_adapters(model)["default"].parameters()]


def test_checkpoints_hold_the_adapter_alone_and_resume(tmp_path: Path) -> None:
    whole, expected = trainer(AdapterTrainer, tmp_path / "whole", 4)
    whole.train()
    first, _ = trainer(Trainer, tmp_path / "parts", 2)
    first.train()
    checkpoint = tmp_path / "parts" / "checkpoint-2"
    assert {"adapter.safetensors", "zero_gate_adapter.json", "optimizer.pt"} <= {
        file.name for file in checkpoint.iterdir()
    }
    assert not list(checkpoint.glob("model*"))
    assert sum(file.stat().st_size for file in checkpoint.iterdir()) < 100_000
    second, resumed = trainer(AdapterTrainer, tmp_path / "parts", 4)
    second.train(resume_from_checkpoint=str(checkpoint))
    for got, wanted in zip(prompts(resumed), prompts(expected), strict=True):
        assert torch.equal(got, wanted)


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path: Path) -> None:
    best, model = trainer(AdapterTrainer, tmp_path, 4, load_best_model_at_end=True, eval_strategy="steps", eval_steps=2)
    best.train()
    other, _ = adapted()
    lak.detach_adapter(other)
    lak.load_adapter(other, best.state.best_model_checkpoint)
    for got, wanted in zip(prompts(model), prompts(other), strict=True):
        assert torch.equal(got, wanted)


def test_nothing_is_dropped_without_a_word(tmp_path: Path) -> None:
    one, _ = trainer(Trainer, tmp_path, 2)
    one.train()
    with pytest.raises((OSError, ValueError), match=r"model_type|config\.json"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    with pytest.raises(ValueError, match="Can't find a valid checkpoint"):  # without the mixin
        trainer(Trainer, tmp_path, 4)[0].train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_several_adapters_are_saved_side_by_side(tmp_path: Path) -> None:
    from llama_adapter_kernels.integrations.transformers.trainer import load_adapters

    model, _ = adapted()
    lak.attach_adapter(model, lak.AdapterConfig(prefix_length=2), "other")
    model.save_pretrained(tmp_path)
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["default", "other"]
    expected = {name: a.layers["0"].prompt.clone() for name, a in lak.attached_adapters(model).items()}
    with torch.no_grad():
        for adapter in lak.attached_adapters(model).values():
            adapter.layers["0"].prompt.zero_()
    load_adapters(model, tmp_path)
    for name, adapter in lak.attached_adapters(model).items():
        assert torch.equal(adapter.layers["0"].prompt, expected[name])
    gathered = {name: tensor * 0 for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=gathered)  # as under FSDP
    load_adapters(model, tmp_path)
    assert not any(p.any() for adapter in lak.attached_adapters(model).values() for p in adapter.parameters())
    lak.set_adapter(model, None)
    lak.detach_adapter(model, "other")
    lak.detach_adapter(model)
    model.save_pretrained(tmp_path / "base")
    assert (tmp_path / "base" / "model.safetensors").exists()
