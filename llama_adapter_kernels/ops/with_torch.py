"""Registers the ops as soon as torch is there, without importing it.

A program that torch.export saved names its ops; loading it needs them registered, and nothing else of this package. So
`import llama_adapter_kernels` registers them, at once where torch is imported already, else when it is: the import order of
the two makes no difference, and the command line's help need not wait for torch.
"""

from llama_adapter_kernels.after_import import after_import


def register() -> None:
    """Registers the ops now or after `import torch`."""
    after_import("torch", "llama_adapter_kernels.ops.registration")
