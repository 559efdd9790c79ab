"""PEFT's AdaptionPrompt as it is and by lak.accelerate_peft: one attention module and whole models, beside the targets.

    python benchmarks/peft_attention.py [--rounds 20] [--threads 2] [--dtype float32]

The module is that of Llama-3.2-1B with a prompt of length 10: forward and backward with 512 tokens, and one token against
512 in the cache. The models are a small Llama with a prompt in every layer: a training step, and one token. Both
contestants are checked against the float64 reference first and take turns, as in `llama-adapter bench`; ratios are of
medians.
"""

import argparse

import torch

from llama_adapter_kernels.bench import runner, tables
from llama_adapter_kernels.bench.cases import Mode, cases
from llama_adapter_kernels.bench.measure import Budget, CpuClock
from llama_adapter_kernels.bench.workload import make_workload

CPU = torch.device("cpu")
# case, mode, the ratio that this project holds itself to, times the rounds: a token takes a hundredth of a pass
RACES: tuple[tuple[str, Mode, float | None, int], ...] = (
    ("module-1b", "forward+backward", 1.3, 1),
    ("module-1b-token", "forward", 1.8, 5),
    ("training-512", "step", None, 1),
    ("generation", "token", None, 5),
)
THEIRS, OURS = "peft", "peft-accelerated"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rounds", type=int, default=20, help="of modules and training steps; five times for one token"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: both")
    parser.add_argument("--case", choices=[race[0] for race in RACES], help="default: all")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name, mode, target, times in RACES:
        if options.case not in (None, name):
            continue
        case, rounds = cases("cpu")[name], options.rounds * times
        for dtype in [options.dtype] if options.dtype else case.dtypes:
            workload = make_workload(case, mode, dtype, CPU)
            entrants = [peer for peer in workload.peers if peer.name in (THEIRS, OURS)]
            found = runner.run_race(workload, entrants, Budget(float("inf"), rounds, rounds), CpuClock())
            theirs, ours = ({entry.peer: entry for entry in found}[peer] for peer in (THEIRS, OURS))
            head = f"{case.title}, {mode}, {dtype}"
            if theirs.median and ours.median:
                aim = "" if target is None else f" (target {target})"
                print(f"{head}: {tables.seconds(theirs.median)} -> {tables.seconds(ours.median)}, "
                      f"{theirs.median / ours.median:.2f}x{aim}")  # fmt: skip
            else:
                print(f"{head}: PEFT: {theirs.reason or 'timed'}; accelerated: {ours.reason or 'timed'}")


if __name__ == "__main__":
    main()
