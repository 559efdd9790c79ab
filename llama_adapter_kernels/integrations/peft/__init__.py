"""PEFT: its AdaptionPrompt on the fused operation, and this package's adapter as one of its methods."""

from llama_adapter_kernels.integrations.peft.registration import register

register()
