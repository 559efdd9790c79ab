"""Prompts that become keys and values by the frozen projections, whatever is tuned in them."""

from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from llama_adapter_kernels.integrations.attachment import Attachment

_bypassed: ContextVar[bool] = ContextVar("zero_gate_bypassed", default=False)


class Bypass:
    """Within the block tuned modules compute, in this thread, what the frozen model does."""

    def __init__(self, attachment: "Attachment") -> None:
        self.attachment = attachment
        self.token: Any = None

    def __enter__(self) -> None:
        if torch.compiler.is_compiling():  # what belongs to a thread cannot be traced; nothing else runs meanwhile
            self.attachment.bypassed = True
        else:
            self.token = _bypassed.set(True)

    def __exit__(self, *_: object) -> None:
        if torch.compiler.is_compiling():
            self.attachment.bypassed = False
        else:
            _bypassed.reset(self.token)


def is_bypassed(attachment: "Attachment") -> bool:
    """Whether this thread is within such a block."""
    return attachment.bypassed if torch.compiler.is_compiling() else _bypassed.get()
