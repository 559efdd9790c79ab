"""Who takes part in the race of fine-tuning: each sets up its own project's training loop."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.training.finetuning_process import MAX_LENGTH, Gate, Race

LENGTH, LAYERS_LEFT_OUT, RANK = 10, 2, 8  # of prompts, of layers below the lowest adapted one, of LoRA
Setup = tuple[Callable[[], Any], int]  # the loop, and how many parameters it trains


def ours(race: Race, gate: Gate, material: tuple[Any, Any, list[Any]], folder: Path) -> Setup:
    """`llama-adapter finetune`: its loop, its defaults but for the rows of a step and how many tokens go at a time."""
    from llama_adapter_kernels.training import loop
    from llama_adapter_kernels.training.preparation import attach
    from llama_adapter_kernels.training.settings import Execution, Settings

    model, _, examples = material
    layers = model.config.num_hidden_layers - LAYERS_LEFT_OUT
    settings = Settings(
        prefix_length=LENGTH, layers=layers, batch_size=race.rows, max_steps=race.steps, dtype=race.dtype,
        max_length=MAX_LENGTH,
    )  # fmt: skip
    execution = Execution(
        tokens_per_micro_batch=race.tokens_at_once, on_cpu=True, tensorboard=False, progress_bar=False, save_steps=10**6
    )
    plan = loop.plan_steps(examples, settings)
    turns = _turns(gate, lambda step: plan.tokens(plan.step(step)))
    adapter = attach(model, settings)

    def run() -> None:
        loop.train(model, adapter, examples, folder, settings, execution, callbacks=[turns])

    return run, adapter.num_parameters()


def _turns(gate: Gate, tokens: Callable[[int], int] = lambda step: 0) -> Any:
    """A callback of transformers' Trainer that waits before every step, and reports it with what `tokens` says it saw."""
    from transformers import TrainerCallback

    class Turns(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            gate.before_step()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            gate.saw(tokens(state.global_step - 1))
            gate.after_step()

    return Turns()


def _trainer_arguments(race: Race, folder: Path) -> dict[str, Any]:
    """What transformers' Trainer and TRL's are told alike."""
    return {
        "output_dir": str(folder), "use_cpu": True, "max_steps": race.steps, "learning_rate": 1e-3, "report_to": "none",
        "logging_strategy": "no", "save_strategy": "no", "disable_tqdm": True, "dataloader_pin_memory": False,
    }  # fmt: skip


def _count(model: nn.Module, gate: Gate) -> None:
    """Tells the gate how many tokens go through the model, padding not counted."""

    def saw(_: nn.Module, arguments: Any, named: dict[str, Any]) -> None:
        mask = named.get("attention_mask")
        gate.saw(named["input_ids"].numel() if mask is None else int(mask.sum()))

    model.register_forward_pre_hook(saw, with_kwargs=True)


def _trainer(race: Race, gate: Gate, material: tuple[Any, Any, list[Any]], folder: Path, config: Any) -> Setup:
    """transformers' Trainer on padded batches."""
    import peft
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    model, tokenizer, examples = material
    model = peft.get_peft_model(model, config)
    rows = [{"input_ids": list(example.tokens), "labels": example.labels} for example in examples]
    arguments = TrainingArguments(
        **_trainer_arguments(race, folder), per_device_train_batch_size=race.rows_at_once,
        gradient_accumulation_steps=race.rows // race.rows_at_once,
    )  # fmt: skip
    collate = DataCollatorForSeq2Seq(tokenizer, padding=True)
    trainer = Trainer(model, arguments, train_dataset=rows, data_collator=collate, callbacks=[_turns(gate)])
    _count(model, gate)
    return trainer.train, _trainable(model)


def adaption_prompt(race: Race, gate: Gate, material: tuple[Any, Any, list[Any]], folder: Path) -> Setup:
    import peft

    layers = material[0].config.num_hidden_layers - LAYERS_LEFT_OUT
    config = peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=LENGTH, adapter_layers=layers)
    return _trainer(race, gate, material, folder, config)


def lora_config() -> Any:
    import peft

    return peft.LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=2 * RANK, target_modules=["q_proj", "v_proj"])


def lora(race: Race, gate: Gate, material: tuple[Any, Any, list[Any]], folder: Path) -> Setup:
    return _trainer(race, gate, material, folder, lora_config())


def trl(race: Race, gate: Gate, material: tuple[Any, Any, list[Any]], folder: Path) -> Setup:
    """TRL's SFTTrainer, packed into bins; positions tell its sequences apart."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model, tokenizer, examples = material
    rows = [{"input_ids": list(e.tokens), "completion_mask": [int(label >= 0) for label in e.labels]} for e in examples]
    mean = sum(map(len, examples)) / len(examples)
    arguments = SFTConfig(
        **_trainer_arguments(race, folder), packing=True, max_length=race.tokens_at_once, per_device_train_batch_size=1,
        gradient_accumulation_steps=max(1, round(race.rows * mean / race.tokens_at_once)), bf16=False,
        completion_only_loss=True, activation_checkpointing=False,
    )  # fmt: skip
    trainer = SFTTrainer(
        model, arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, peft_config=lora_config(),
        callbacks=[_turns(gate)],
    )  # fmt: skip
    _count(trainer.model, gate)
    return trainer.train, _trainable(trainer.model)


def litgpt(race: Race, gate: Gate, material: tuple[Any, Any, list[Any]], folder: Path) -> Setup:
    """LitGPT's `finetune_adapter`: its model and its `fit`, with its collator's padded batches."""
    import lightning
    from litgpt.adapter import GPT, Config, mark_only_adapter_as_trainable
    from litgpt.args import EvalArgs, TrainArgs
    from litgpt.finetune.adapter import fit, get_lr_scheduler
    from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
    from torch.utils.data import DataLoader

    model, _, examples = material
    config = litgpt_config(Config, model.config)
    fabric = lightning.Fabric(
        accelerator="cpu", devices=1, precision={"float32": "32-true", "bfloat16": "bf16-true"}[race.dtype]
    )
    with fabric.init_module():
        network = GPT(config)
    weights: dict[str, torch.Tensor] = {}
    copy_weights_hf_llama(config, {}, weights, dict(model.state_dict()))
    network.load_state_dict(weights, strict=False)
    mark_only_adapter_as_trainable(network)
    trained = _trainable(network)
    network = fabric.setup_module(network)
    optimizer = fabric.setup_optimizers(
        torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=1e-3)
    )
    rows = [_litgpt_row(example) for example in examples]
    train = DataLoader(rows, batch_size=race.rows_at_once, collate_fn=_litgpt_collate())
    turns = _LitGptTurns(train, gate, race.rows // race.rows_at_once)
    arguments = TrainArgs(
        global_batch_size=race.rows, micro_batch_size=race.rows_at_once, epochs=10**6, max_steps=race.steps,
        log_interval=10**6, save_interval=None, lr_warmup_steps=1, max_seq_length=MAX_LENGTH,
    )  # fmt: skip
    schedule = get_lr_scheduler(optimizer, warmup_steps=1, max_steps=race.steps)

    def run() -> None:
        fit(
            fabric=fabric, model=network, optimizer=optimizer, scheduler=schedule, train_dataloader=turns,
            val_dataloader=DataLoader(rows[:1], collate_fn=_litgpt_collate()), devices=1, checkpoint_dir=Path(race.model),
            out_dir=folder, train=arguments, eval=EvalArgs(interval=10**6), data=None,
        )  # fmt: skip

    return run, trained


def litgpt_config(kind: Any, config: Any) -> Any:
    """LitGPT's configuration of a Llama of transformers."""
    return kind(
        block_size=config.max_position_embeddings, vocab_size=config.vocab_size, padded_vocab_size=config.vocab_size,
        n_layer=config.num_hidden_layers, n_head=config.num_attention_heads, n_embd=config.hidden_size,
        n_query_groups=config.num_key_value_heads, rotary_percentage=1.0, parallel_residual=False, bias=False,
        norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP", intermediate_size=config.intermediate_size,
        rope_base=int(config.rope_parameters["rope_theta"]), norm_eps=config.rms_norm_eps,
        adapter_prompt_length=LENGTH, adapter_start_layer=LAYERS_LEFT_OUT,
    )  # fmt: skip


def _litgpt_row(example: Any) -> dict[str, Any]:
    count = torch.tensor(len(example))
    return {
        "input_ids": torch.tensor(example.tokens), "labels": torch.tensor(example.labels),
        "token_counts": {"raw": count, "raw_plus_prompt_template": count},
    }  # fmt: skip


def _litgpt_collate() -> Any:
    from litgpt.data.base import get_sft_collate_fn

    return get_sft_collate_fn(max_seq_length=MAX_LENGTH)


class _LitGptTurns:
    """A data loader whose first batch of every step waits for the driver; asking for the next one ends a step."""

    def __init__(self, loader: Any, gate: Gate, batches: int) -> None:
        self.loader, self.dataset, self.gate, self.batches = loader, loader.dataset, gate, batches

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        for number, batch in enumerate(self.loader):
            if number % self.batches == 0:
                if number:
                    self.gate.after_step()
                self.gate.before_step()
            self.gate.saw(int(batch["token_counts"]["raw"].sum()))
            yield batch


CONTESTANTS = {
    "ours": ("this package, `finetune`", ours),
    "adaption-prompt": ("HF Trainer + PEFT AdaptionPrompt", adaption_prompt),
    "lora": ("HF Trainer + PEFT LoRA r8", lora),
    "trl-lora": ("TRL SFTTrainer, packed, LoRA r8", trl),
    "litgpt": ("LitGPT finetune_adapter", litgpt),
}


def _trainable(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
