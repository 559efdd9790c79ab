"""The fused operation against two SDPA calls and a multiply-add on two CPU threads, beside the floors of this project.

    python benchmarks/attention_floors.py [--rounds 15] [--output results.json]

Prints a Markdown table: medians of both, their ratio, the floor this project holds itself to, and the share of the rate
of a matrix product (decode: of a plain sum) that took its turns in the same race. A 16-bit type is measured against
float32 products where the CPU multiplies its own no faster. Contestants, checks and timing are those of
`llama-adapter bench`.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch

from llama_adapter_kernels.bench import ceilings, runner
from llama_adapter_kernels.bench.cases import Mode, cases
from llama_adapter_kernels.bench.measure import Budget, CpuClock, race
from llama_adapter_kernels.bench.results import Measurement, Results
from llama_adapter_kernels.bench.workload import make_workload

CPU = torch.device("cpu")
# case, dtype -> the ratios that forward and forward + backward are held to
FLOORS: dict[tuple[str, str], tuple[float, ...]] = {
    ("floor-32x512", "bfloat16"): (3.0, 2.5),
    ("floor-4x8x512", "bfloat16"): (3.0, 2.5),
    ("floor-8x2048", "bfloat16"): (2.2, 1.8),
    ("floor-32x512", "float32"): (1.6, 1.5),
    ("floor-4x8x512", "float32"): (1.6, 1.5),
    ("floor-8x2048", "float32"): (1.2, 1.2),
    ("floor-4x8x512", "float16"): (2.0, 4.0),
    ("floor-decode", "bfloat16"): (5.0,),
}
OURS, BASELINE = "ours-cpu", "two-sdpa"
PRODUCT_SIZE = 2048


@dataclass(frozen=True)
class Result:
    """Medians in seconds; rate and ceiling in FLOP/s, of decode in bytes/s."""

    baseline: float
    ours: float
    rate: float
    ceiling: float


def run(case_name: str, mode: Mode, dtype: str, rounds: int, kept: list[Measurement]) -> Result:
    """One race, with the ceiling as one more contestant.

    Raises:
        SystemExit: one of the two did not run or is wrong.
    """
    workload = make_workload(cases("cpu")[case_name], mode, dtype, CPU)
    found, calls = runner.admit_all(workload, [peer for peer in workload.peers if peer.name in (OURS, BASELINE)])
    for name in (OURS, BASELINE):
        if name not in calls:
            raise SystemExit(f"{case_name} {mode} {dtype}: {name}: {found[name].reason}")
    if workload.case.question == "decode":
        everything = torch.ones(int(found[OURS].bytes) // 4)
        calls["ceiling"], amount, most = everything.sum, found[OURS].bytes, 4.0 * everything.numel()
    else:
        faster = dtype if ceilings.has_instructions(dtype) else "float32"
        calls["ceiling"], amount, most = (
            ceilings.product(PRODUCT_SIZE, faster, CPU), found[OURS].flop, 2.0 * PRODUCT_SIZE**3,
        )  # fmt: skip
    timings, failed = race(calls, CpuClock(), Budget(float("inf"), rounds, rounds), workload.case.cold)
    runner.enter(found, timings, failed)
    kept += found.values()
    baseline, ours, ceiling = (timings[name].median for name in (BASELINE, OURS, "ceiling"))
    return Result(baseline, ours, amount / ours, most / ceiling)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, help="keep the figures in this file, for `llama-adapter bench-report`")
    options = parser.parse_args()
    torch.set_num_threads(2)
    kept: list[Measurement] = []
    head = ("shape (B, H, S, D)", "dtype", "forward ms", "ratio (floor)", "forward+backward ms", "ratio (floor)",
            "GFLOP/s of GEMM's")  # fmt: skip
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for (name, dtype), floors in FLOORS.items():
        case = cases("cpu")[name]
        found = [run(name, mode, dtype, options.rounds, kept) for mode in case.modes]
        pairs = [
            f"{1e3 * result.baseline:.1f} → {1e3 * result.ours:.1f} | {result.baseline / result.ours:.2f}x ({floor})"
            for result, floor in zip(found, floors, strict=True)
        ]
        rate, ceiling = found[0].rate / 1e9, found[0].ceiling / 1e9
        share = f"{rate:.0f} of {ceiling:.0f} ({rate / ceiling:.0%})"
        if case.question == "decode":
            print(f"\n{case.title}, {dtype}: {pairs[0].replace(' | ', ' ms, ')}; reads {share} GB/s of a plain sum")
        else:
            print(f"| {case.title} | {dtype} | {pairs[0]} | {pairs[1]} | {share} |")
    if options.output is not None:
        start = runner.start(CPU, Budget(0.0, options.rounds, options.rounds), [], CpuClock())
        Results(start.machine, start.method, start.ceilings, start.recorded, kept).save(options.output)


if __name__ == "__main__":
    main()
