"""Zero-init attention (LLaMA-Adapter, arXiv 2303.16199) as one fused operation."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from llama_adapter_kernels.after_import import after_import
from llama_adapter_kernels.ops import with_torch

__version__ = "0.1.0"

if TYPE_CHECKING:
    from llama_adapter_kernels.adapters.config import AdapterConfig
    from llama_adapter_kernels.adapters.v2 import Tuning
    from llama_adapter_kernels.integrations.adapter import ZeroGateAdapter
    from llama_adapter_kernels.integrations.architectures import Architecture, Fused, Heads, Separate
    from llama_adapter_kernels.integrations.attach import attach_adapter, detach_adapter, load_adapter
    from llama_adapter_kernels.integrations.choosing import (
        adapters_per_sequence,
        attached_adapters,
        limit_frozen_prefixes,
        set_adapter,
    )
    from llama_adapter_kernels.integrations.conditioning import Conditioning, attach_conditioning, load_conditioning
    from llama_adapter_kernels.integrations.peft.accelerating import accelerate_peft, restore_peft
    from llama_adapter_kernels.integrations.peft.config import ZeroGateConfig
    from llama_adapter_kernels.integrations.registry import known_architectures, register_architecture
    from llama_adapter_kernels.integrations.transformers.trainer import AdapterTrainerMixin
    from llama_adapter_kernels.ops.attention import (
        zero_gate_attention,
        zero_gate_attention_varlen,
        zero_gate_decode,
    )
    from llama_adapter_kernels.ops.backends import available_backends, use_backend

# Each name and the module it comes from, which is loaded when the name is first used: the import costs no time.
_LAZY = {
    "AdapterConfig": "adapters.config",
    "AdapterTrainerMixin": "integrations.transformers.trainer",
    "Architecture": "integrations.architectures",
    "Conditioning": "integrations.conditioning",
    "Fused": "integrations.architectures",
    "Heads": "integrations.architectures",
    "Separate": "integrations.architectures",
    "Tuning": "adapters.v2",
    "ZeroGateAdapter": "integrations.adapter",
    "ZeroGateConfig": "integrations.peft.config",
    "accelerate_peft": "integrations.peft.accelerating",
    "adapters_per_sequence": "integrations.choosing",
    "attach_adapter": "integrations.attach",
    "attach_conditioning": "integrations.conditioning",
    "attached_adapters": "integrations.choosing",
    "available_backends": "ops.backends",
    "detach_adapter": "integrations.attach",
    "known_architectures": "integrations.registry",
    "limit_frozen_prefixes": "integrations.choosing",
    "load_adapter": "integrations.attach",
    "load_conditioning": "integrations.conditioning",
    "register_architecture": "integrations.registry",
    "restore_peft": "integrations.peft.accelerating",
    "set_adapter": "integrations.choosing",
    "use_backend": "ops.backends",
    "zero_gate_attention": "ops.attention",
    "zero_gate_attention_varlen": "ops.attention",
    "zero_gate_decode": "ops.attention",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})


with_torch.register()
after_import("peft", f"{__name__}.integrations.peft")  # its from_pretrained finds this package's method, too

__all__ = [
    "AdapterConfig",
    "AdapterTrainerMixin",
    "Architecture",
    "Conditioning",
    "Fused",
    "Heads",
    "Separate",
    "Tuning",
    "ZeroGateAdapter",
    "ZeroGateConfig",
    "accelerate_peft",
    "adapters_per_sequence",
    "attach_adapter",
    "attach_conditioning",
    "attached_adapters",
    "available_backends",
    "detach_adapter",
    "known_architectures",
    "limit_frozen_prefixes",
    "load_adapter",
    "load_conditioning",
    "register_architecture",
    "restore_peft",
    "set_adapter",
    "use_backend",
    "zero_gate_attention",
    "zero_gate_attention_varlen",
    "zero_gate_decode",
]
