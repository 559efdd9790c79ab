"""What an attached adapter costs a whole model: a training step and one new token, beside the frozen base and PEFT.

    python benchmarks/adapter_step.py [--rounds 30] [--threads 2]

The model is a Llama of 4 layers, hidden size 512 and 8 heads, with a prompt of length 10 and a gate in every layer. The
frozen base has nothing to train: there the embedded tokens require the gradient, so that its backward pass runs down to
where an adapter's does. Contestants take turns and are checked first, as in `llama-adapter bench`.
"""

import argparse

import torch

from llama_adapter_kernels.bench import runner, tables
from llama_adapter_kernels.bench.cases import cases
from llama_adapter_kernels.bench.measure import Budget, CpuClock
from llama_adapter_kernels.bench.workload import make_workload

CPU = torch.device("cpu")
CASES = {"training-512": 1, "generation": 10}  # case -> times the rounds: a token takes a hundredth of a step
CONTESTANTS = ("sdpa", "ours-adapter", "two-sdpa", "peft")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="of the training step; ten times as many of the token")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: both")
    parser.add_argument("--case", choices=list(CASES), help="default: both")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name in [options.case] if options.case else CASES:
        case, rounds = cases("cpu")[name], options.rounds * CASES[name]
        for dtype in [options.dtype] if options.dtype else case.dtypes:
            workload = make_workload(case, case.modes[0], dtype, CPU)
            entrants = [peer for peer in workload.peers if peer.name in CONTESTANTS]
            found = runner.run_race(workload, entrants, Budget(float("inf"), rounds, rounds), CpuClock())
            base = found[0].median
            print(f"{case.title}, {dtype}, {rounds} rounds")
            for entry in found:
                ratio = f"{entry.median / base:8.3f}" if entry.median and base else f"  {entry.reason}"
                print(f"  {entry.label:28}{tables.seconds(entry.median):>10}{ratio}")


if __name__ == "__main__":
    main()
