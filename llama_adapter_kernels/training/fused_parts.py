"""liger-kernel's RMSNorm, rotary embedding and SwiGLU in a model, where they are installed and the device is a GPU.

What is beside attention in a training step: fused, each reads and writes its tensors once. Its losses are left out: this
package's keeps less (training/loss.py).
"""

import importlib.util
import logging
from typing import Any

from llama_adapter_kernels.errors import UserError
from llama_adapter_kernels.training.settings import Execution, Settings

log = logging.getLogger(__name__)

_PARTS = {"rope": True, "rms_norm": True, "swiglu": True, "geglu": True}
_LOSSES = {"cross_entropy": False, "fused_linear_cross_entropy": False}


def wants_liger(settings: Settings, execution: Execution, device: Any) -> bool:
    """Whether a run uses liger-kernel: on a GPU, where it is installed, unless --no-liger or --v2, which tunes the norms.

    Raises:
        UserError: --liger, and it cannot be.
    """
    problem = None
    if device.type != "cuda":
        problem = f"its kernels are for GPUs, the device is {device}"
    elif importlib.util.find_spec("liger_kernel") is None:
        problem = "liger-kernel is not installed: pip install 'llama-adapter-kernels[gpu]'"
    elif settings.v2:
        problem = "--v2 tunes the norms, which liger-kernel would compute without what is tuned"
    if execution.liger and problem is not None:
        raise UserError(f"--liger: {problem}")
    return execution.liger is not False and problem is None


def fuse_parts(network: Any) -> bool:
    """Puts liger-kernel's parts into a loaded model, before an adapter is attached; whether it knows such models.

    Models of this kind that the process builds later get them too: liger-kernel replaces classes of transformers.
    """
    from liger_kernel.transformers import monkey_patch

    kind = network.config.model_type
    if kind not in monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN:
        log.info("liger-kernel has nothing for %s", kind)
        return False
    monkey_patch._apply_liger_kernel_to_instance(model=network, **_PARTS, **_LOSSES)
    log.info("norms, rotations and feed-forward activations by liger-kernel")
    return True
