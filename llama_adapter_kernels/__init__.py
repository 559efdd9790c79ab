"""Zero-init attention (LLaMA-Adapter, arXiv 2303.16199) as one fused operation."""

from typing import TYPE_CHECKING, Any

from llama_adapter_kernels.ops.attention import (
    zero_gate_attention,
    zero_gate_attention_varlen,
    zero_gate_decode,
)
from llama_adapter_kernels.ops.backends import available_backends, use_backend

__version__ = "0.1.0"

if TYPE_CHECKING:
    from llama_adapter_kernels.adapters.config import AdapterConfig
    from llama_adapter_kernels.integrations.adapter import ZeroGateAdapter
    from llama_adapter_kernels.integrations.transformers.attach import attach_adapter, detach_adapter, load_adapter

# Loaded when first used: the operation alone needs neither of these modules.
_LAZY = {
    "AdapterConfig": "adapters.config",
    "ZeroGateAdapter": "integrations.adapter",
    "attach_adapter": "integrations.transformers.attach",
    "detach_adapter": "integrations.transformers.attach",
    "load_adapter": "integrations.transformers.attach",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "AdapterConfig",
    "ZeroGateAdapter",
    "attach_adapter",
    "available_backends",
    "detach_adapter",
    "load_adapter",
    "use_backend",
    "zero_gate_attention",
    "zero_gate_attention_varlen",
    "zero_gate_decode",
]
