"""The CUDA kernels, executed by the emulator, against float64 by the tolerance rule.

Small shapes that cross every tile edge; each case under another order of the threads.
"""

from dataclasses import replace
from types import ModuleType

import pytest
import torch

from llama_adapter_kernels.testing import Case, deviations, make_problem, truth_of
from tests.support.emulated import EmulatedProblem

SMALL = Case(batch=1, heads_q=2, heads_kv=1, head_dim=64)
HALF = (torch.bfloat16, torch.float16)
CASES = [
    *(replace(SMALL, seq_q=s, seq_k=s) for s in (1, 15, 16, 17, 63, 64, 65, 127, 129)),
    *(replace(SMALL, seq_q=q, seq_k=k) for q, k in ((1, 150), (65, 64), (64, 65), (130, 33), (3, 0))),
    *(replace(SMALL, seq_q=20, seq_k=40, prefix_length=p) for p in (0, 1, 9, 15, 16, 17, 33)),
    *(replace(SMALL, seq_q=20, seq_k=40, head_dim=d) for d in (8, 40, 72, 128, 136, 256)),
    Case(heads_q=6, heads_kv=2, head_dim=64),
    *(Case(batch=4, prefix=p, gate=g, head_dim=64, seq_q=17, seq_k=17)
      for p, g in (("sequence", "prefix"), ("table", "prefix"), ("table", "scalar"), ("none", "head"))),
    *(Case(batch=3, head_dim=64, seq_q=33, seq_k=70, window=w, is_causal=c)
      for w, c in (("start", True), ("end", False), ("both", True))),
    *(Case(mask=m, head_dim=64, is_causal=m == "bool") for m in ("bool", "float", "row")),
    *(Case(layout=layout, head_dim=64) for layout in ("bshd", "padded")),
    Case(lengths=((3, 5), (0, 2), (70, 70), (4, 0), (0, 0)), head_dim=64),
    Case(lengths=((5, 5), (64, 64), (1, 1)), prefix="table", gate="prefix", head_dim=128),
    Case(lengths=((5, 5), (40, 40), (1, 1)), prefix="sequence", gate="prefix", head_dim=64),
]  # fmt: skip


def verdict(problem: object, results: dict[str, torch.Tensor]) -> None:
    bad = [str(d) for d in deviations(problem, results, truth_of(problem)) if not d.ok]
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda n: CASES[n].name)
def test_forward_and_backward(emulator: ModuleType, number: int) -> None:
    case = CASES[number]
    dtype = torch.float32 if number % 5 == 4 else HALF[number % 2]
    problem = make_problem(case, dtype)
    outputs = []
    for seed in (number, number + 1000, number + 2000):
        run = EmulatedProblem(emulator, problem, seed=seed, deterministic=number % 2 == 0)
        output, logsumexp = run.forward()
        assert not logsumexp.isnan().any()
        outputs.append(output)
        if seed < 2000:  # the last one runs forward alone: half of the time for most of the barriers
            verdict(problem, {"output": output} | run.backward())
    assert all(torch.equal(output, outputs[0]) for output in outputs)


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_what_is_asked_for(emulator: ModuleType, needs: tuple[bool, bool, bool]) -> None:
    problem = make_problem(replace(SMALL, seq_q=33, seq_k=33), torch.bfloat16)
    run = EmulatedProblem(emulator, problem, seed=7)
    run.forward()
    verdict(problem, run.backward(*needs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case(batch=2, heads_q=8, heads_kv=2, seq_q=1, seq_k=150, head_dim=64, window="both"),
        Case(batch=3, heads_q=4, heads_kv=2, seq_q=1, seq_k=65, head_dim=40, prefix="table", window="end"),
        Case(batch=1, heads_q=5, heads_kv=1, seq_q=4, seq_k=300, head_dim=128, prefix_length=33),
        Case(batch=1, heads_q=2, heads_kv=1, seq_q=2, seq_k=100, head_dim=256),
        Case(batch=1, heads_q=2, heads_kv=2, seq_q=1, seq_k=0, head_dim=64),
        Case(batch=1, heads_q=2, heads_kv=2, seq_q=1, seq_k=64, head_dim=64, prefix="none"),
        Case(batch=1, heads_q=2, heads_kv=1, seq_q=1, seq_k=600, head_dim=40, prefix="none"),
    ],
    ids=lambda case: case.name,
)
def test_decode(emulator: ModuleType, case: Case, dtype: torch.dtype) -> None:
    problem = make_problem(case, dtype)
    verdict(problem, {"output": EmulatedProblem(emulator, problem, seed=3).decode()})


def test_gate_zero_is_plain_attention_bit_for_bit(emulator: ModuleType) -> None:
    problem = make_problem(replace(SMALL, seq_q=65, seq_k=65), torch.bfloat16)
    problem.tensors["gate"].data.zero_()
    output, _ = EmulatedProblem(emulator, problem).forward()
    plain = make_problem(replace(SMALL, seq_q=65, seq_k=65, prefix="none"), torch.bfloat16)
    for name in ("query", "key", "value"):
        plain.tensors[name] = problem.tensors[name]
    assert torch.equal(output, EmulatedProblem(emulator, plain).forward()[0])


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_order_of_threads_does_not_matter(emulator: ModuleType, deterministic: bool) -> None:
    problem = make_problem(replace(SMALL, seq_q=70, seq_k=70), torch.bfloat16)
    runs = []
    for seed in range(4):
        run = EmulatedProblem(emulator, problem, seed=seed, deterministic=deterministic)
        runs.append([run.forward()[0], *run.backward().values()])
    for results in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], results, strict=True))
