"""Whether a backend's kernels can run on a device, found by asking the device, and the sentence that says why not.

What cannot change while the process lives is asked once per device. What can (no memory for a context, a forked child
that must not touch the GPU) is asked again.
"""

from collections.abc import Callable

import torch

from llama_adapter_kernels.ops import cuda_library, registration
from llama_adapter_kernels.ops.order import CUDA_ERRORS

# By (backend, index of the device): why not, or None.
_settled: dict[tuple[str, int], str | None] = {}


def _find_reason(backend: str, device: torch.device) -> str | None:
    if backend == "cpu":
        return registration.library_error if device.type == "cpu" else f"runs on cpu, not on {device.type}"
    if backend == "triton":
        return _cuda_problem(device) or _triton_reason(device)
    if device.type != "cuda":
        return f"runs on cuda, not on {device.type}"
    return _cuda_problem(device) or _cuda_reason(device)


# The compiler asks once, instead of tracing into drivers and settings.
unavailable_reason: Callable[[str, torch.device], str | None] = torch.compiler.assume_constant_result(_find_reason)


def forget() -> None:
    """Asks every device again. For tests."""
    _settled.clear()


def _cuda_problem(device: torch.device) -> str | None:
    """Why torch itself cannot use a CUDA `device`; None when it can, and for other devices."""
    if device.type != "cuda":
        return None
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    try:
        torch.cuda.init()
        count = torch.cuda.device_count()
    except CUDA_ERRORS as error:  # no driver, a driver too old for torch, no device, a forked child: torch says which
        return _first_sentence(error)
    if count == 0:
        return "there is no CUDA device here"
    if device.index is not None and device.index >= count:
        return f"there is no device {device}: {count} here"
    return None


def _cuda_reason(device: torch.device) -> str | None:
    reason = registration.cuda_library_error or cuda_library.torch_problem()
    if reason is not None:
        return reason
    index = torch.cuda.current_device() if device.index is None else device.index
    if ("cuda", index) not in _settled:
        try:
            with torch.cuda.device(index):  # gives the device back without a context on it, if it had none
                reason, can_change = cuda_library.probe()
        except CUDA_ERRORS as error:  # torch could not make a context there
            reason, can_change = _first_sentence(error), True
        if reason is not None:
            reason = f"{_name(index)}: {reason}"
        if can_change:
            return reason
        _settled["cuda", index] = reason
    return _settled["cuda", index]


def _triton_reason(device: torch.device) -> str | None:
    from llama_adapter_kernels import triton_kernels

    if device.type != "cuda":  # without a device Triton may still interpret its kernels
        return triton_kernels.unavailable_reason(device)
    index = torch.cuda.current_device() if device.index is None else device.index
    if ("triton", index) not in _settled:
        _settled["triton", index] = triton_kernels.unavailable_reason(torch.device("cuda", index))
    return _settled["triton", index]


def _name(index: int) -> str:
    try:
        properties = torch.cuda.get_device_properties(index)
    except CUDA_ERRORS:
        return f"cuda:{index}"
    return f"{properties.name} (compute capability {properties.major}.{properties.minor})"


def _first_sentence(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0].split(". ")[0].strip().rstrip(".") if lines else type(error).__name__
