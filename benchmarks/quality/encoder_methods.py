"""The ways to adapt a pre-trained encoder to a new task that are compared; the new head is trained in all of them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peft
from torch import nn

import llama_adapter_kernels as lak
from benchmarks.quality import joint


@dataclass(frozen=True)
class Method:
    """A way to adapt an encoder.

    Args:
        title: for tables and plots.
        rates: among which the learning rate is chosen.
        prepare: (encoder, length of a prompt, rank of LoRA) -> what to call in place of the encoder; requires_grad says
            what is trained.
    """

    title: str
    rates: tuple[float, ...]
    prepare: Callable[[Any, int, int], Any]


def _zero_gates(encoder: Any, length: int, rank: int) -> Any:
    lak.attach_adapter(encoder, lak.AdapterConfig(prefix_length=length))
    return encoder


def _lora(encoder: Any, length: int, rank: int) -> Any:
    targets = ["query", "value"] if _names(encoder, "query") else ["q_proj", "v_proj"]
    return peft.get_peft_model(encoder, peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets))


def _prefix_tuning(encoder: Any, length: int, rank: int) -> Any:
    """PEFT's for a BERT; it has none for vision models: there keys and values stand before the words' likewise."""
    if _names(encoder, "query"):
        config = peft.PrefixTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=length)
        return peft.get_peft_model(encoder, config)
    heads = encoder.config.num_attention_heads
    head_dim = encoder.config.hidden_size // heads
    layers = [module for module in encoder.modules() if hasattr(module, "k_proj")]
    joint.attach(encoder, {layer: joint.KeysAndValues(length, layer, heads, head_dim) for layer in layers})
    return encoder


def _head_only(encoder: Any, length: int, rank: int) -> Any:
    return encoder.requires_grad_(False)


def _everything(encoder: Any, length: int, rank: int) -> Any:
    return encoder


def _names(encoder: nn.Module, last: str) -> bool:
    return any(name.rpartition(".")[2] == last for name, _ in encoder.named_modules())


PROMPT_RATES = (3e-3, 1e-2, 3e-2, 1e-1)
METHODS = {
    "zero-gate": Method("zero-init gates (this package)", PROMPT_RATES, _zero_gates),
    "full": Method("full fine-tuning", (3e-5, 1e-4, 3e-4, 1e-3), _everything),
    "head": Method("head only", PROMPT_RATES, _head_only),
    "lora": Method("LoRA (PEFT)", (3e-4, 1e-3, 3e-3, 1e-2), _lora),
    "prefix-tuning": Method("prefix tuning", PROMPT_RATES, _prefix_tuning),
}
