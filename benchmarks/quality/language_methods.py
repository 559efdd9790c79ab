"""The ways to fine-tune a causal language model that are compared: each makes parameters of a loaded model trainable."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peft
import torch
from torch import nn

import llama_adapter_kernels as lak
from benchmarks.quality import joint
from benchmarks.quality.runs import Run


@dataclass(frozen=True)
class Method:
    """A way to fine-tune.

    Args:
        title: for tables and plots.
        rates: among which the learning rate is chosen.
        prepare: (model, run) -> what to call in place of the model; requires_grad says what is trained.
        prompts: whether `Run.layers` and `Run.length` mean anything to it.
        rate_of: the method whose learning rate it takes, because it is to differ from that one in one thing alone.
    """

    title: str
    rates: tuple[float, ...]
    prepare: Callable[[Any, Run], Any]
    prompts: bool = False
    rate_of: str = ""


def _zero_gates(model: Any, run: Run) -> Any:
    lak.attach_adapter(model, lak.AdapterConfig(prefix_length=run.length, num_layers=run.layers))
    return model


def _random_gates(model: Any, run: Run) -> Any:
    adapter = lak.attach_adapter(model, lak.AdapterConfig(prefix_length=run.length, num_layers=run.layers))
    for layer in adapter.layers.values():
        nn.init.normal_(layer.gate)
    return model


def _no_gate(model: Any, run: Run) -> Any:
    config, layers = model.config, model.model.layers[-run.layers :]
    head_dim = config.hidden_size // config.num_attention_heads
    joint.attach(model, {
        layer.self_attn: joint.ProjectedPrompt(run.length, layer.self_attn, config.hidden_size, head_dim)
        for layer in layers
    })  # fmt: skip
    return model


def _lora(rank: int) -> Callable[[Any, Run], Any]:
    def prepare(model: Any, run: Run) -> Any:
        config = peft.LoraConfig(
            task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules=["q_proj", "v_proj"]
        )
        return peft.get_peft_model(model, config)

    return prepare


def _prefix_tuning(model: Any, run: Run) -> Any:
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=PREFIX_TUNING_TOKENS)
    return peft.get_peft_model(model, config)


def _everything(model: Any, run: Run) -> Any:
    return model


# With SmolLM2-135M's 30 layers, 9 and 3 heads of 64: a zero-gate adapter of length 10 has 173,070 parameters, prefix tuning
# of 15 tokens and LoRA of rank 3 on query and value have 172,800 each, LoRA of rank 8 has 460,800.
PREFIX_TUNING_TOKENS = 15
PROMPT_RATES = (1e-2, 3e-2, 1e-1)
METHODS = {
    "zero-gate": Method("zero-init gates (this package)", PROMPT_RATES, _zero_gates, prompts=True),
    "random-gate": Method("random gates", PROMPT_RATES, _random_gates, prompts=True, rate_of="zero-gate"),
    "no-gate": Method("no gate: prompts in one softmax", PROMPT_RATES, _no_gate, prompts=True, rate_of="zero-gate"),
    "lora-r3": Method("LoRA r3, as many parameters", (3e-3, 1e-2, 3e-2), _lora(3), rate_of="lora-r8"),
    "lora-r8": Method("LoRA r8", (3e-3, 1e-2, 3e-2), _lora(8)),
    "prefix-tuning": Method("prefix tuning", PROMPT_RATES, _prefix_tuning),
    "full": Method("full fine-tuning", (3e-5, 1e-4, 3e-4), _everything),
}


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def optimizer_of(model: nn.Module, rate: float, steps: int) -> tuple[torch.optim.Optimizer, Any]:
    """AdamW without weight decay, and a schedule: a tenth of the steps to warm up, then a cosine down to 0."""
    optimizer = torch.optim.AdamW(trained(model), lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    warm_up = max(1, steps // 10)
    rise = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warm_up, total_iters=warm_up)
    fall = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps - warm_up))
    return optimizer, torch.optim.lr_scheduler.SequentialLR(optimizer, [rise, fall], [warm_up])
