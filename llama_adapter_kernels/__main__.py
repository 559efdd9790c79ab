"""`python -m llama_adapter_kernels` is `llama-adapter`, which is how torchrun starts it."""

from llama_adapter_kernels.cli import app

app(prog_name="llama-adapter")
