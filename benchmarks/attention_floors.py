"""The fused operation against two scaled_dot_product_attention calls + gate, on two CPU threads, interleaved in one run.

    python benchmarks/attention_floors.py [--rounds 15] [--json FILE]

Prints a Markdown table: medians of both, their ratio, the floor this project holds itself to, and the share of the GEMM rate
(decode: of the read rate) measured in the same race. Causal products are counted without what the mask hides. A 16-bit type
is held against float32 matrices where the CPU multiplies its own no faster.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import llama_adapter_kernels as lak
from llama_adapter_kernels.bench.machine import product_rate

# (batch, heads, seq, head_dim), dtype -> floors of forward and forward + backward
FLOORS = {
    ((1, 32, 512, 128), torch.bfloat16): (3.0, 2.5),
    ((4, 8, 512, 64), torch.bfloat16): (3.0, 2.5),
    ((1, 8, 2048, 64), torch.bfloat16): (2.2, 1.8),
    ((1, 32, 512, 128), torch.float32): (1.6, 1.5),
    ((4, 8, 512, 64), torch.float32): (1.6, 1.5),
    ((1, 8, 2048, 64), torch.float32): (1.2, 1.2),
    ((4, 8, 512, 64), torch.float16): (2.0, 4.0),
}
DECODE_FLOOR = 5.0


def milliseconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def medians(calls: list[Callable[[], object]], rounds: int) -> list[float]:
    """One median per call; the calls take turns, so that drift of the machine hits all alike."""
    times: list[list[float]] = [[] for _ in calls]
    for round_ in range(rounds + 2):
        for call, own in zip(calls, times, strict=True):
            elapsed = milliseconds(call)
            if round_ >= 2:  # warm-up
                own.append(elapsed)
    return [statistics.median(own) for own in times]


GEMM_SIZE = 2048


def gemm(dtype: torch.dtype) -> Callable[[], Tensor]:
    """A matrix product in the dtype, or in float32 where that is faster: 2 GEMM_SIZE^3 operations."""
    faster = max((torch.float32, dtype), key=lambda kind: product_rate(str(kind)[6:]))
    a = torch.randn(GEMM_SIZE, GEMM_SIZE).to(faster)
    return lambda: a @ a


def two_calls(q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor, gate: Tensor, causal: bool) -> Tensor:
    words = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    prefix = (pk.expand(q.shape[0], -1, -1, -1), pv.expand(q.shape[0], -1, -1, -1))
    return words + gate[:, None, None].to(q.dtype) * F.scaled_dot_product_attention(q, *prefix, enable_gqa=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(2)
    torch.manual_seed(0)
    rows = []
    print(
        "| shape (B, H, S, D) | dtype | forward ms | ratio (floor) | forward+backward ms | ratio (floor) "
        "| GFLOP/s of GEMM's |"
    )
    print("|---|---|---|---|---|---|---|")
    for (shape, dtype), floors in FLOORS.items():
        batch, heads, seq, head_dim = shape
        q, k, v = (torch.randn(shape).to(dtype).requires_grad_() for _ in range(3))
        pk, pv = (torch.randn(1, heads, 10, head_dim).to(dtype).requires_grad_() for _ in range(2))
        gate = torch.randn(heads, requires_grad=True)
        doutput = torch.randn(shape).to(dtype)
        tensors = (q, k, v, pk, pv, gate)
        with torch.no_grad():
            *forward, product = medians(
                [
                    lambda t=tensors: two_calls(*t, True),
                    lambda t=tensors: lak.zero_gate_attention(*t, is_causal=True),
                    gemm(dtype),
                ],
                options.rounds,
            )
        both = medians(
            [
                lambda t=tensors, d=doutput: torch.autograd.grad(two_calls(*t, True), t, d),
                lambda t=tensors, d=doutput: torch.autograd.grad(lak.zero_gate_attention(*t, is_causal=True), t, d),
            ],
            max(3, options.rounds // 3),
        )
        rate, ceiling = 2 * batch * heads * seq * seq * head_dim / forward[1] / 1e6, 2 * GEMM_SIZE**3 / product / 1e6
        row = [forward[0] / forward[1], both[0] / both[1]]
        rows.append({"shape": shape, "dtype": str(dtype), "forward_ms": forward, "both_ms": both,
                     "gflop_s": rate, "gemm_gflop_s": ceiling})  # fmt: skip
        print(
            f"| {shape} | {str(dtype)[6:]} | {forward[0]:.1f} → {forward[1]:.1f} | {row[0]:.2f}x ({floors[0]}) "
            f"| {both[0]:.0f} → {both[1]:.0f} | {row[1]:.2f}x ({floors[1]}) "
            f"| {rate:.0f} of {ceiling:.0f} ({rate / ceiling:.0%}) |"
        )
    q = torch.randn(8, 32, 1, 128).bfloat16()
    k, v = (torch.randn(8, 8, 4096, 128).bfloat16() for _ in range(2))
    pk, pv = (torch.randn(1, 8, 10, 128).bfloat16() for _ in range(2))
    gate, everything = torch.randn(32), torch.empty(k.numel(), dtype=torch.float32).normal_()
    with torch.no_grad():
        sdpa, ours, plain_sum = medians(
            [
                lambda: two_calls(q, k, v, pk, pv, gate, False),
                lambda: lak.zero_gate_decode(q, k, v, None, pk, pv, gate),
                everything.sum,
            ],
            options.rounds,
        )
    read, reachable = (k.numel() * 4 / t / 1e6 for t in (ours, plain_sum))
    rows.append({"decode_ms": [sdpa, ours], "read_gb_s": read, "sum_gb_s": reachable})
    print(f"\ndecode, 8 sequences, 32/8 heads, 4096 keys, head_dim 128, bfloat16: {sdpa:.1f} → {ours:.1f} ms, "
          f"{sdpa / ours:.2f}x (floor {DECODE_FLOOR}); reads {read:.1f} GB/s, a plain sum {reachable:.1f} GB/s "
          f"({read / reachable:.0%})")  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
