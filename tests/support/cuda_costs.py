"""What the CUDA kernels cost in small problems, counted by the emulator: python -m tests.support.cuda_costs records it.

Matrix instructions, operands, asynchronous copies, barriers, shuffles and votes, reductions, accesses of shared memory, and
bytes that threads ask global memory for.
"""

import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import torch

from llama_adapter_kernels.testing import Case, Problem, make_problem
from tests.support.emulated import EmulatedProblem
from tests.support.emulator import load_emulator

RECORD = Path(__file__).parents[1] / "cuda" / "costs.json"
ONE = Case(batch=1, heads_q=1, heads_kv=1, head_dim=64)
WINDOW = (64, 320)  # of the cases "window": whole tiles before it and after it
# bfloat16 with 64 columns: test_cuda_costs.py knows how many matrix instructions there have to be.
HALF = {
    "dense": replace(ONE, seq_q=200, seq_k=200),
    "dense, more keys": replace(ONE, seq_q=70, seq_k=300),
    "dense, more queries": replace(ONE, seq_q=300, seq_k=70),
    "not causal": replace(ONE, seq_q=70, seq_k=130, is_causal=False),
    "whole tiles": replace(ONE, seq_q=128, seq_k=128),
    "window": replace(ONE, seq_q=70, seq_k=400, window="both"),
    "window, not causal": replace(ONE, seq_q=70, seq_k=400, window="both", is_causal=False),
    "mask": replace(ONE, seq_q=100, seq_k=100, mask="bool"),
    "long prefix": replace(ONE, seq_q=70, seq_k=70, prefix_length=33),
    "a group": replace(ONE, heads_q=3, seq_q=130, seq_k=130),
    "packed": replace(ONE, lengths=((70, 70), (1, 1), (130, 130), (60, 60), (64, 64))),
    "packed, a group": replace(ONE, heads_q=2, lengths=((5, 5), (100, 100), (30, 30))),
    "packed, not causal": replace(ONE, lengths=((70, 70), (90, 90)), is_causal=False),
    "packed, other keys": replace(ONE, lengths=((3, 70), (64, 64), (0, 9), (20, 90))),
    "packed, a sequence without queries": replace(ONE, lengths=((83, 83), (0, 64), (5, 5))),
}
NOT_FINITE = "packed, not finite"
OTHERS = {
    "no prefix": (replace(ONE, seq_q=70, seq_k=70, prefix="none"), torch.bfloat16),
    "packed, table": (replace(ONE, lengths=((70, 70), (5, 5)), prefix="table"), torch.bfloat16),
    "long": (replace(ONE, seq_q=70, seq_k=800, prefix_length=20), torch.bfloat16),
    "long, 40 columns": (replace(ONE, seq_q=70, seq_k=800, head_dim=40), torch.bfloat16),
    "128 columns": (replace(ONE, seq_q=130, seq_k=130, head_dim=128), torch.float16),
    "256 columns": (replace(ONE, seq_q=40, seq_k=40, head_dim=256, prefix_length=17), torch.bfloat16),
    "float32": (replace(ONE, seq_q=70, seq_k=70, prefix_length=17), torch.float32),
    "float32, 256 columns": (replace(ONE, seq_q=33, seq_k=33, head_dim=256, prefix_length=17), torch.float32),
    "float32, no keys": (replace(ONE, seq_q=20, seq_k=0, is_causal=False), torch.float32),
    "256 columns, no keys": (replace(ONE, seq_q=20, seq_k=0, head_dim=256, is_causal=False), torch.bfloat16),
    "no keys": (replace(ONE, seq_q=20, seq_k=0, is_causal=False), torch.bfloat16),
    NOT_FINITE: (replace(ONE, lengths=((20, 20), (17, 17), (19, 19))), torch.bfloat16),
    "packed, some without a prefix": (replace(ONE, batch=3, seq_q=9, seq_k=9, prefix="table"), torch.bfloat16),
    "float32, packed": (replace(ONE, heads_q=2, lengths=((70, 70), (5, 5))), torch.float32),
}
DECODE = {
    "decode": (replace(ONE, heads_q=4, seq_q=1, seq_k=300), torch.bfloat16),
    "decode, one split, long prefix": (replace(ONE, heads_q=9, seq_q=2, seq_k=100, prefix_length=17), torch.bfloat16),
    "decode, float32": (replace(ONE, heads_q=4, heads_kv=2, seq_q=1, seq_k=300, prefix_length=16), torch.float32),
    "decode, 40 columns": (replace(ONE, heads_q=4, seq_q=1, seq_k=600, head_dim=40), torch.bfloat16),
}


def mask_of(case: Case) -> torch.Tensor:
    """Of every seventh row 16 keys are left, of the row after it 17, of others all; the last row sees a single one."""
    mask = torch.ones(case.seq_q, case.seq_k, dtype=torch.bool)
    mask[:64:7, 16:] = False
    mask[1:64:7, 17:] = False
    mask[72, 10:50] = False  # more than a few in the end, alone among the rows of its warp
    mask[83, 10:60] = False
    mask[-1] = False
    mask[-1, 3] = True
    return mask


def problem_of(name: str) -> Problem:
    case, dtype = (HALF[name], torch.bfloat16) if name in HALF else (OTHERS | DECODE)[name]
    problem = make_problem(case, dtype)
    if case.mask == "bool":
        problem.arguments["attn_mask"] = mask_of(case)
    if name == NOT_FINITE and (value := problem.tensors["value"]) is not None:
        value.data[25] = torch.nan
    if case.window == "both":
        limits = (torch.tensor([limit], dtype=torch.int32) for limit in WINDOW)
        problem.arguments |= dict(zip(("key_start", "key_end"), limits, strict=True))
    return problem


def costs_of(emulator: ModuleType, name: str) -> dict[str, dict[str, int]]:
    """By pass and what is counted."""
    run = EmulatedProblem(emulator, problem_of(name))
    result: dict[str, dict[str, int]] = {}
    for function in ("decode",) if name in DECODE else ("forward", "backward"):
        emulator.counts(), emulator.traffic()
        getattr(run, function)()
        counts = {what: count for what, count in emulator.counts().items() if count > 0}
        asked = sum(asked for asked, _, _ in emulator.traffic().values())
        result[function] = counts | {"bytes_asked_for": asked}
    return result


def costs_of_dquery_alone(emulator: ModuleType) -> dict[str, int]:
    run = EmulatedProblem(emulator, problem_of("dense"))
    run.forward()
    emulator.counts()
    run.backward(need_dkey_dvalue=False, need_dprefix=False)
    return dict(emulator.counts())


def main() -> None:
    emulator = load_emulator()
    record: dict[str, object] = {name: costs_of(emulator, name) for name in (*HALF, *OTHERS, *DECODE)}
    record["dQ alone"] = costs_of_dquery_alone(emulator)
    RECORD.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
