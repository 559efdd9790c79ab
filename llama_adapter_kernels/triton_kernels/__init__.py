"""The Triton backend: zero-init attention on any NVIDIA GPU from compute capability 8.0, without a compiler to install.

`forward`, `backward` and `decode` take what the ops of the same name take (see `llama_adapter_kernels.ops`). Importing
this package does not import Triton; the first call does.
"""

import importlib.metadata
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["backward", "decode", "forward", "unavailable_reason"]

MINIMUM_TRITON = (3, 6)
MINIMUM_CAPABILITY = (8, 0)


def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    """See `launchers.forward`."""
    from llama_adapter_kernels.triton_kernels import launchers

    return launchers.forward(*arguments)


def backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `backward_launcher.backward`."""
    from llama_adapter_kernels.triton_kernels import backward_launcher

    return backward_launcher.backward(*arguments)


def decode(*arguments: Any) -> Tensor:
    """See `launchers.decode`."""
    from llama_adapter_kernels.triton_kernels import launchers

    return launchers.decode(*arguments)


def unavailable_reason(device: torch.device) -> str | None:
    """Why this backend cannot run tensors on `device`; None when it can."""
    return _reason(device)


def _find_reason(device: torch.device) -> str | None:
    reason = _triton_problem()
    if reason is not None:
        return reason
    from triton import knobs

    if knobs.runtime.interpret:
        return None
    if device.type != "cuda":
        return f"runs on cuda, not on {device.type} (TRITON_INTERPRET=1 interprets it there, slowly)"
    if torch.version.cuda is None:
        return "needs an NVIDIA GPU and a torch built with CUDA"
    capability = torch.cuda.get_device_capability(device)
    if capability < MINIMUM_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        return f"needs compute capability 8.0 or later, {name} has {capability[0]}.{capability[1]}"
    return None


# The compiler asks once, instead of tracing into Triton's settings.
_reason: Callable[[torch.device], str | None] = torch.compiler.assume_constant_result(_find_reason)


def _triton_problem() -> str | None:
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:  # without origin: some folder that happens to be called triton
        return "Triton is not installed: pip install 'triton>=3.6'"
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:  # built from source without metadata, or renamed by a distributor
        import triton

        version = triton.__version__
    if tuple(int(part) for part in version.split(".")[:2]) < MINIMUM_TRITON:
        return f"needs Triton 3.6 or later, {version} is installed"
    return None
