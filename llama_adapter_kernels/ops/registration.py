"""Loads the op libraries and gives their ops what torch needs: shapes for tracing (fakes) and gradients.

`forward` returns (output, logsumexp), `backward` the six gradients, `decode` the output. The same three ops exist twice:
`llama_adapter_kernels::*` are C++ (CPU, and CUDA where its library is loaded), `llama_adapter_kernels_triton::*` are Triton.
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama_adapter_kernels.ops import cuda_tiles
from llama_adapter_kernels.ops.arguments import Gradients, of_backward, of_forward

_PACKAGE = Path(__file__).parent.parent

# Said once, for C++ and for Triton: CMake puts the same text into the C++ library.
SCHEMAS = [
    line
    for line in (Path(__file__).parent / "schemas.txt").read_text().splitlines()
    if line and not line.startswith("#")
]


def _load(name: str) -> str | None:
    """Loads one shared object of the package; returns why it could not, None on success."""
    library = _PACKAGE / name
    if not library.exists():
        return f"{name} is not built: install the package with `pip install --no-build-isolation .`"
    if not _is_whole(library):
        return f"{name} does not load: it is cut off or no shared library; install the package again"
    try:
        torch.ops.load_library(library)
    except OSError as error:  # built for another platform, or against something that is not here
        return f"{name} does not load: {error}"
    return None


def _is_whole(library: Path) -> bool:
    """Whether an ELF file has all its bytes: loading one that is cut off (a copy that was interrupted) ends the process.

    Its section headers are at the end. Other formats are left to the loader.
    """
    with library.open("rb") as file:
        header = file.read(64)
    if header[:4] != b"\x7fELF" or len(header) < 64:
        return len(header) == 64
    offset, entry, count = (int.from_bytes(header[a:b], sys.byteorder) for a, b in ((40, 48), (58, 60), (60, 62)))
    return library.stat().st_size >= offset + entry * count


library_error = _load("libllama_adapter_kernels.so")


def _cuda_library_error() -> str | None:
    if not torch.backends.cuda.is_built():
        return "this torch is built without CUDA"
    return library_error or _load("libllama_adapter_kernels_cuda.so") or cuda_tiles.apply()


cuda_library_error = _cuda_library_error()


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def forward_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    (query, *_), options = of_forward(arguments)
    # [B, Hq, Sq, D] has statistics [B, Hq, Sq]; packed [T, Hq, D] has [Hq, T].
    rows = query.shape[:3] if options.cu_seqlens_q is None else (query.shape[1], query.shape[0])
    return torch.empty_like(query), query.new_empty(rows, dtype=accumulator_dtype(query.dtype))


def backward_fake(*arguments: Any) -> Gradients:
    call = of_backward(arguments)
    query, key, value, prefix_key, prefix_value, gate = call.inputs

    def like(tensor: Tensor | None, needed: bool) -> Tensor:
        return torch.empty_like(tensor) if needed and tensor is not None else query.new_empty(0)

    if call.needed.dprefix and gate is not None:
        dgate = gate.new_empty(gate.shape)  # contiguous, whatever the strides of an expanded gate
    else:
        dgate = query.new_empty(0)
    return (
        like(query, call.needed.dquery),
        like(key, call.needed.dkey_dvalue),
        like(value, call.needed.dkey_dvalue),
        like(prefix_key, call.needed.dprefix),
        like(prefix_value, call.needed.dprefix),
        dgate,
    )


def decode_fake(query: Tensor, *others: Any) -> Tensor:
    return torch.empty_like(query)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, prefix_key, prefix_value, gate, *rest = inputs
    *masks, max_seqlen_q, max_seqlen_k, scale, is_causal = rest
    ctx.save_for_backward(query, key, value, prefix_key, prefix_value, gate, *output, *masks)
    ctx.scalars = (max_seqlen_q, max_seqlen_k, scale, is_causal)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _refuse_second_derivative(ctx: Any, *gradients: Tensor) -> None:
    raise RuntimeError(
        'zero-gate attention has no second derivative (double backward); use backend="reference" for one'
    )


def _refuse_gradient_of_decode(ctx: Any, *gradients: Tensor) -> None:
    raise RuntimeError("zero_gate_decode has no gradient; use zero_gate_attention")


def register(namespace: str) -> None:
    """Gives the ops of `namespace` fakes and gradients."""
    packet = getattr(torch.ops, namespace)

    def backward(ctx: Any, doutput: Tensor | None, dlogsumexp: Tensor | None) -> tuple[Tensor | None, ...]:
        if doutput is None:  # only logsumexp was used, which has no gradient
            return (None,) * 16
        need = ctx.needs_input_grad
        gradients = packet.backward(
            doutput,
            *ctx.saved_tensors,
            *ctx.scalars,
            need[0],
            need[1] or need[2],
            need[3] or need[4] or need[5],
            torch.are_deterministic_algorithms_enabled(),
        )
        wanted = [gradient if needed else None for gradient, needed in zip(gradients, need[:6], strict=True)]
        return (*wanted, *(None,) * 10)

    torch.library.register_fake(f"{namespace}::forward", forward_fake)
    torch.library.register_fake(f"{namespace}::backward", backward_fake)
    torch.library.register_fake(f"{namespace}::decode", decode_fake)
    torch.library.register_autograd(f"{namespace}::forward", backward, setup_context=_save_for_backward)
    torch.library.register_autograd(f"{namespace}::backward", _refuse_second_derivative)
    torch.library.register_autograd(f"{namespace}::decode", _refuse_gradient_of_decode)


def _register_triton() -> torch.library.Library:
    """Triton kernels as ops: torch.compile treats them as opaque, and needs Triton only when one is called."""
    library = torch.library.Library("llama_adapter_kernels_triton", "DEF")
    for schema in SCHEMAS:
        library.define(schema)

    def implementation(name: str) -> Any:
        def call(*arguments: Any) -> Any:
            from llama_adapter_kernels import triton_kernels

            return getattr(triton_kernels, name)(*arguments)

        return call

    for name in ("forward", "backward", "decode"):
        for key in ("CUDA", "CPU"):  # CPU tensors reach Triton's interpreter
            library.impl(name, implementation(name), key)
    register("llama_adapter_kernels_triton")
    return library


if library_error is None:
    register("llama_adapter_kernels")
_triton_library = _register_triton()

# The CPU kernels' instruction set: baseline, avx2, avx512, avx512_bf16 or amx_bf16. Read once, when it is first needed.
CPU_ISA_VARIABLE = "LAK_CPU_ISA"


def cpu_instruction_sets() -> tuple[list[str], str]:
    """(instruction sets that run on this CPU, weakest first; the one in use, or why none is)."""
    usable = torch.ops.llama_adapter_kernels.cpu_instruction_sets().split()
    try:
        return usable, torch.ops.llama_adapter_kernels.cpu_instruction_set()
    except RuntimeError:  # what every call of a kernel raises
        return usable, f"none, {CPU_ISA_VARIABLE}={os.environ.get(CPU_ISA_VARIABLE)} is not one of them"
