"""What the machine can do at most, measured in the same run: the lines that a roofline is made of."""

from functools import partial

import torch

from llama_adapter_kernels.bench import machine
from llama_adapter_kernels.bench.measure import Budget, Call, CpuClock, CudaClock, race

_BUDGET = Budget(seconds=1.5, least_rounds=5, most_rounds=30)


def measure(device: torch.device, dtypes: tuple[str, ...], clock: CpuClock | CudaClock) -> dict[str, float]:
    """{"gemm_<dtype>": FLOP/s, "copy": bytes/s (read and written), "read": bytes/s}; the best round of each counts."""
    gpu = device.type == "cuda"
    memory = 1 << 30 if gpu else 256 << 20
    calls: dict[str, Call] = {}
    sizes = {}
    for name in dtypes:
        # Where a product is slow at any size, a large one would take the better part of a minute, five times.
        size = sizes[f"gemm_{name}"] = 8192 if gpu else 2048 if machine.product_rate(name) > 1e10 else 512
        dtype = getattr(torch, name)
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        result = torch.empty(size, size, dtype=dtype, device=device)
        calls[f"gemm_{name}"] = partial(torch.mm, left, right, out=result)
    source = torch.ones(memory // 4, device=device)
    target = torch.empty_like(source)
    calls["copy"] = partial(target.copy_, source)
    calls["read"] = source.sum
    timings, _ = race(calls, clock, _BUDGET)
    best = {name: timing.least for name, timing in timings.items()}
    amount = {"copy": 2.0 * memory, "read": float(memory)}
    amount |= {name: 2.0 * size**3 for name, size in sizes.items()}
    return {name: amount[name] / seconds for name, seconds in best.items()}
