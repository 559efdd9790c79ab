"""transformers' Trainer and TRL's SFTTrainer: what learns, what a checkpoint holds, and how a run goes on from one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import llama_adapter_kernels as lak
from tests.support.small_models import TOKENS
from tests.support.tiny_model import save_tiny_model

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")  # TRL's word
ROWS = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in (TOKENS[0], TOKENS[0] + 5, TOKENS[0] + 9)]
COMMON: dict[str, Any] = {
    "per_device_train_batch_size": 1, "learning_rate": 0.01, "save_steps": 2, "report_to": [], "use_cpu": True,
    "lr_scheduler_type": "constant", "logging_steps": 1, "disable_tqdm": True,
}  # fmt: skip
CONFIG: dict[str, Any] = {"prefix_length": 4, "num_layers": 2, "task_type": "CAUSAL_LM"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


def base(folder: Path) -> nn.Module:
    torch.manual_seed(3)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def ours(folder: Path) -> nn.Module:
    model = base(folder)
    lak.attach_adapter(model, lak.AdapterConfig(prefix_length=4, num_layers=2))
    return model


def wrapped(folder: Path) -> Any:
    return peft.get_peft_model(base(folder), lak.ZeroGateConfig(**CONFIG))


def learned(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in lak.attached_adapters(model)["default"].parameters()]


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def sft(kind: Any, model: nn.Module, folder: Path, output: Path, steps: int, **more: Any) -> Any:
    from datasets import Dataset
    from trl import SFTConfig

    arguments = SFTConfig(str(output), max_steps=steps, bf16=False, max_length=32, **COMMON | {"packing": False})
    rows = Dataset.from_list([{"input_ids": row["input_ids"]} for row in ROWS])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return kind(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer, **more)


def plain(kind: Any, model: nn.Module, folder: Path, output: Path, steps: int) -> Any:
    return kind(model, TrainingArguments(str(output), max_steps=steps, **COMMON), train_dataset=ROWS)


def checkpoint(output: Path, *expected: str) -> Path:
    """The checkpoint after two steps, which holds the adapter alone."""
    found = output / "checkpoint-2"
    names = {file.name for file in found.iterdir()}
    assert {*expected, "optimizer.pt", "trainer_state.json"} <= names
    assert not names & {"model.safetensors", "pytorch_model.bin"}
    assert sum((found / name).stat().st_size for name in expected) < 20_000
    return found


@pytest.mark.parametrize("make", [plain, sft], ids=["Trainer", "SFTTrainer"])
def test_a_peft_model_trains_saves_and_resumes(make: Any, folder: Path, tmp_path: Path) -> None:
    kind = Trainer
    if make is sft:
        kind = pytest.importorskip("trl").SFTTrainer
    whole = wrapped(folder)
    frozen = {name: parameter.clone() for name, parameter in whole.named_parameters() if not parameter.requires_grad}
    start = learned(whole)
    make(kind, whole, folder, tmp_path / "whole", 4).train()
    assert not any(torch.equal(a, b) for a, b in zip(start, learned(whole), strict=True))
    assert all(torch.equal(parameter, frozen[name]) for name, parameter in whole.named_parameters() if name in frozen)
    make(kind, wrapped(folder), folder, tmp_path / "parts", 2).train()
    saved = checkpoint(tmp_path / "parts", "adapter_model.safetensors", "adapter_config.json")
    resumed = wrapped(folder)
    make(kind, resumed, folder, tmp_path / "parts", 4).train(resume_from_checkpoint=str(saved))
    assert same(learned(resumed), learned(whole))
    loaded = peft.PeftModel.from_pretrained(base(folder), tmp_path / "whole" / "checkpoint-4")
    assert same(learned(loaded), learned(whole))


def test_sft_trainer_puts_the_method_around_a_model(folder: Path, tmp_path: Path) -> None:
    kind = pytest.importorskip("trl").SFTTrainer
    trainer = sft(kind, base(folder), folder, tmp_path, 2, peft_config=lak.ZeroGateConfig(**CONFIG))
    before = learned(trainer.model)
    trainer.train()
    assert not same(before, learned(trainer.model))
    trainer.save_model(tmp_path / "final")
    assert same(learned(peft.PeftModel.from_pretrained(base(folder), tmp_path / "final")), learned(trainer.model))


def test_sft_trainer_with_an_attached_adapter(folder: Path, tmp_path: Path) -> None:
    """Without PEFT: checkpoints hold the adapter, and the mixin resumes from them."""
    kind = pytest.importorskip("trl").SFTTrainer
    ours_kind = type("AdapterSFTTrainer", (lak.AdapterTrainerMixin, kind), {})
    whole = ours(folder)
    sft(ours_kind, whole, folder, tmp_path / "whole", 4).train()
    sft(kind, ours(folder), folder, tmp_path / "parts", 2).train()
    saved = checkpoint(tmp_path / "parts", "adapter.safetensors", "zero_gate_adapter.json")
    resumed = ours(folder)
    sft(ours_kind, resumed, folder, tmp_path / "parts", 4).train(resume_from_checkpoint=str(saved))
    assert same(learned(resumed), learned(whole))
    with pytest.raises(ValueError, match="Can't find a valid checkpoint"):  # without the mixin
        sft(kind, ours(folder), folder, tmp_path / "parts", 4).train(resume_from_checkpoint=str(saved))


def test_an_attached_adapter_beside_lora(folder: Path, tmp_path: Path) -> None:
    """PEFT's model writes what is PEFT's; the mixin writes and reads the rest."""

    def both() -> Any:
        torch.manual_seed(4)
        lora = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
        model = peft.get_peft_model(base(folder), lora)
        lak.attach_adapter(model, lak.AdapterConfig(prefix_length=4, num_layers=2), trainable=["*lora*"])
        return model

    def trained(model: nn.Module) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in model.parameters() if parameter.requires_grad]

    kind = type("AdapterTrainer", (lak.AdapterTrainerMixin, Trainer), {})
    whole = both()
    plain(kind, whole, folder, tmp_path / "whole", 4).train()
    plain(kind, both(), folder, tmp_path / "parts", 2).train()
    saved = checkpoint(tmp_path / "parts", "adapter_model.safetensors", "adapter.safetensors", "zero_gate_adapter.json")
    resumed = both()
    plain(kind, resumed, folder, tmp_path / "parts", 4).train(resume_from_checkpoint=str(saved))
    assert len(trained(resumed)) == 4 + 6
    assert same(trained(resumed), trained(whole))


def test_the_mixin_leaves_peft_models_to_their_trainer(folder: Path, tmp_path: Path) -> None:
    kind = type("AdapterTrainer", (lak.AdapterTrainerMixin, Trainer), {})
    whole = wrapped(folder)
    plain(kind, whole, folder, tmp_path / "whole", 4).train()
    plain(kind, wrapped(folder), folder, tmp_path / "parts", 2).train()
    resumed = wrapped(folder)
    plain(kind, resumed, folder, tmp_path / "parts", 4).train(resume_from_checkpoint=True)
    assert same(learned(resumed), learned(whole))
