"""Which device a command runs on."""

import os
from typing import Any

from llama_adapter_kernels.errors import UserError

EXPECTED = "auto, cpu, cuda, cuda:N, mps or another device that torch knows"


def pick_device(name: str) -> Any:
    """The torch.device of a `--device`; "auto": a CUDA device where there is one, else the CPU.

    Raises:
        UserError: torch does not know the name, or has no such device here.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device: expected {EXPECTED}, got {name!r}") from None
    if device.type == "cpu":
        return torch.device("cpu")
    count = _count(device.type)
    if not count:
        raise UserError(
            f"--device {name}: torch {torch.__version__} sees no {device.type} device here; cpu always works"
        )
    if device.index is not None and device.index >= count:
        known = ", ".join(f"{device.type}:{number}" for number in range(count))
        raise UserError(f"--device {name}: expected one of the devices that are here, {known}")
    if device.index is not None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            f"--device {name}: expected {device.type} without a number, each of several processes gets a device of its own"
        )
    return device


def chosen_device(device: str, cpu: bool) -> Any:
    """The torch.device of a command that has `--cpu` as a short form of `--device cpu`.

    Raises:
        UserError: as `pick_device`, or both are given.
    """
    if cpu and device not in ("auto", "cpu"):
        raise UserError(f"--cpu, --device {device}: expected one of them, got both")
    return pick_device("cpu" if cpu else device)


def _count(kind: str) -> int:
    """How many devices of a kind torch can use here."""
    import torch

    try:
        module = torch.get_device_module(kind)
    except RuntimeError:  # such as meta, or a backend that this torch was not built with
        return 0
    if not hasattr(module, "is_available") or not module.is_available():
        return 0
    return int(module.device_count())
