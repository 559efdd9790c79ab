"""liger-kernel's parts beside a model's own, for a process whose Triton interprets kernels."""

from typing import Any

import torch

import llama_adapter_kernels as lak
from llama_adapter_kernels.training.fused_parts import fuse_parts
from llama_adapter_kernels.training.loss import response_loss
from llama_adapter_kernels.training.packing import pack
from llama_adapter_kernels.training.tokens import Example
from tests.support.small_models import build

BATCH = [Example(tuple(3 + 7 * i % 90 for i in range(17)), 8), Example(tuple(5 + 11 * i % 90 for i in range(9)), 3)]


def make_interpretable() -> None:
    """Three things that liger-kernel asks of Triton and its interpreter does not have."""
    import numpy as np
    import triton.language as tl
    from liger_kernel.ops import rms_norm
    from triton.runtime import interpreter

    def scalar(value: Any) -> Any:
        if isinstance(value, float):  # a device gets scalars that know `.to(dtype)`
            return tl.tensor(interpreter.TensorHandle(np.array([value], dtype=np.float32), tl.float32), tl.float32)
        return convert(value)

    def patch_tensor(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)  # NumPy 2.4 makes numbers of arrays without dimensions only; here they have one
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    convert, patch = interpreter._implicit_cvt, interpreter._patch_lang_tensor
    interpreter._implicit_cvt, interpreter._patch_lang_tensor = scalar, patch_tensor
    rms_norm.rsqrt = lambda x: tl.math.rsqrt(x)  # libdevice's is an empty function until a device fills it in


def gradients(kind: str, dtype: torch.dtype, fused: bool) -> dict[str, torch.Tensor]:
    """Loss of two packed sequences, and gradients of an adapter with open gates. The weights are the same in every dtype."""
    network = build(kind, dtype)
    network.load_state_dict({name: weight.bfloat16() for name, weight in build(kind).state_dict().items()})
    if fused:
        assert fuse_parts(network)
    adapter = lak.attach_adapter(network, lak.AdapterConfig(prefix_length=4, num_layers=3))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in adapter.layers.values():
            layer.prompt.copy_(torch.randn(layer.prompt.shape, generator=generator).bfloat16())
            layer.gate.fill_(0.75)
    loss, _ = response_loss(network, pack(BATCH))
    loss.backward()
    return {"loss": loss.detach()} | {name: parameter.grad for name, parameter in adapter.named_parameters()}
