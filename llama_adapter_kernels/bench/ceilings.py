"""What the machine can do at most, measured in the same run: the lines that a roofline is made of."""

from collections.abc import Collection
from functools import cache, partial

import torch

from llama_adapter_kernels.bench.cases import DTYPES
from llama_adapter_kernels.bench.measure import Call, CpuClock, CudaClock, undisturbed

# Where torch multiplies matrices of a dtype so many times slower than float32 ones, the CPU has no instructions for it.
NO_INSTRUCTIONS = 8.0
_PROBE_SIZE = 256
# Sides of the matrices. The largest reaches the highest rate on a quiet machine; on a busy one a product of a few
# milliseconds is more likely to be left in peace.
_CPU_SIZES, _GPU_SIZES = (512, 1024, 2048), (8192,)


def product(size: int, dtype: str, device: torch.device) -> Call:
    """A matrix product of 2 size^3 operations."""
    left, right = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
    return partial(torch.mm, left, right, out=torch.empty_like(left))


@cache
def product_rates() -> dict[str, float]:
    """{dtype: FLOP/s} of a small matrix product on this CPU.

    Measured in turns and until the rates repeat themselves, so that a busy machine does not look like one without
    instructions for a dtype. Without them torch multiplies bfloat16 matrices a hundred times slower than float32 ones.
    """
    calls = {dtype: product(_PROBE_SIZE, dtype, torch.device("cpu")) for dtype in DTYPES}
    seconds = undisturbed(calls, CpuClock(), longest=5.0)
    return {dtype: 2.0 * _PROBE_SIZE**3 / seconds[dtype] for dtype in DTYPES}


def has_instructions(dtype: str) -> bool:
    """Whether this CPU multiplies matrices of `dtype` at about the rate of float32 ones, or faster."""
    rates = product_rates()
    return rates[dtype] * NO_INSTRUCTIONS > rates["float32"]


def measure(device: torch.device, dtypes: Collection[str], clock: CpuClock | CudaClock) -> dict[str, float]:
    """{"gemm_<dtype>": FLOP/s, "copy": bytes/s (read and written), "read": bytes/s}; the best round of each counts."""
    gpu = device.type == "cuda"
    memory = 1 << 30 if gpu else 256 << 20
    calls: dict[str, Call] = {}
    amounts: dict[str, float] = {}
    for dtype in dtypes:
        # Where a product is slow at any size, a large one would take the better part of a minute.
        sizes = _GPU_SIZES if gpu else _CPU_SIZES if has_instructions(dtype) else _CPU_SIZES[:1]
        for size in sizes:
            calls[f"gemm_{dtype} {size}"] = product(size, dtype, device)
            amounts[f"gemm_{dtype} {size}"] = 2.0 * size**3
    source = torch.ones(memory // 4, device=device)
    target = torch.empty_like(source)
    calls |= {"copy": partial(target.copy_, source), "read": source.sum}
    amounts |= {"copy": 2.0 * memory, "read": float(memory)}
    rates: dict[str, float] = {}
    for name, seconds in undisturbed(calls, clock, longest=8.0).items():
        ceiling = name.partition(" ")[0]
        rates[ceiling] = max(rates.get(ceiling, 0.0), amounts[name] / seconds)
    return rates
