"""Random float32 problems far from unit scale: which results of the CPU backend tests/support/scales.py does not allow.

    PYTHONPATH=. python scripts/errors_at_scale.py [--problems 250] [--seed 1]

That rule takes four orders of head_dim to find out how much FlashAttention's formula errs. Where a result errs more than
twice that, the formula is computed in 64 orders, which tells an error of ours from few draws of the same lottery.
"""

import argparse
import random

import torch

from llama_adapter_kernels.testing import Case, truth_of
from tests.support.scales import Scales, error_of, faults_at_scale, flash_errors, scaled_problem


def draw(rng: random.Random) -> tuple[Case, Scales]:
    heads_kv, queries = rng.choice([1, 2]), rng.choice([1, 2, 5, 17, 40, 64, 65, 100, 130])
    case = Case(
        batch=rng.choice([1, 2]), heads_q=heads_kv * rng.choice([1, 2, 4]), heads_kv=heads_kv, seq_q=queries,
        seq_k=max(queries, rng.choice([queries, queries + 7, 30, 64, 129, 200])),
        head_dim=rng.choice([8, 16, 40, 64, 80, 128]), prefix_length=rng.choice([1, 5, 10, 16, 33]),
        is_causal=rng.random() < 0.5, mask=rng.choice(["none", "none", "bool", "float"]), seed=rng.randrange(10**6),
    )  # fmt: skip
    between = {"query": (-1, 2), "key": (-1, 2), "value": (-2, 2), "doutput": (-2, 2), "gate": (-1, 1)}
    return case, Scales(**{name: 10 ** rng.uniform(*powers) for name, powers in between.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=250)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    rng, results_seen, beyond = random.Random(options.seed), 0, 0
    for _ in range(options.problems):
        case, scales = draw(rng)
        problem = scaled_problem(case, torch.float32, scales)
        output = problem.forward("cpu")
        results = {"output": output.detach()}
        results |= {f"d{name}": gradient for name, gradient in problem.backward(output).items()}
        truth = truth_of(problem)
        results_seen += len(results)
        faults = faults_at_scale(problem, results, truth)
        of_formula = flash_errors(problem, truth.exact, orders=64) if faults else {}
        beyond += len(faults)
        for fault in faults:
            name = fault.split(":", 1)[0]
            ratio = error_of(results[name], truth.exact[name]) / of_formula[name]
            print(
                f"{case.name} {scales}\n  {fault}\n  {ratio:.2f} times the formula's largest error in 64 orders",
                flush=True,
            )
    print(f"{results_seen} results of {options.problems} problems, {beyond} of them beyond the rule")


if __name__ == "__main__":
    main()
