"""timm's VisionTransformer family."""

from llama_adapter_kernels.integrations.architectures import Architecture

ROWS: tuple[Architecture, ...] = ()
