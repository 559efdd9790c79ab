"""Zero-init attention (LLaMA-Adapter, arXiv 2303.16199) as one fused operation."""

from llama_adapter_kernels.attention import (
    zero_gate_attention,
    zero_gate_attention_varlen,
    zero_gate_decode,
)
from llama_adapter_kernels.backends import available_backends, use_backend

__version__ = "0.1.0"

__all__ = [
    "available_backends",
    "use_backend",
    "zero_gate_attention",
    "zero_gate_attention_varlen",
    "zero_gate_decode",
]
