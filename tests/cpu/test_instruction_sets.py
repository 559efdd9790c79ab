"""Which instruction set the kernels use, and that it cannot change under a running operation."""

import os
import subprocess
import sys
import threading

import pytest
import torch

from llama_adapter_kernels.testing import Case, Problem, make_problem
from tests.support.instruction_sets import USABLE, forced

# A name that is not one, then one that is, then another: the environment counts until it has been read.
READS_ENVIRONMENT = """
import os, torch
import llama_adapter_kernels as lak
from llama_adapter_kernels.ops import registration
x = torch.randn(1, 1, 2, 8)
try:
    lak.zero_gate_attention(x, x, x, None, None, None, backend="cpu")
except RuntimeError as error:
    print(error)
print(registration.cpu_instruction_sets()[1])
for name in ("baseline", "avx2", "mmx"):
    os.environ["LAK_CPU_ISA"] = name
    lak.zero_gate_attention(x, x, x, None, None, None, backend="cpu")
    print(torch.ops.llama_adapter_kernels.cpu_instruction_set())
"""


def test_the_environment_is_read_once() -> None:
    environment = os.environ | {"LAK_CPU_ISA": "mmx"}
    result = subprocess.run(
        [sys.executable, "-c", READS_ENVIRONMENT], capture_output=True, text=True, env=environment, check=True
    )
    error, none, *used = result.stdout.splitlines()
    assert f"LAK_CPU_ISA: expected one of {', '.join(USABLE)} on this CPU, got mmx" in error
    assert none == "none, LAK_CPU_ISA=mmx is not one of them"
    assert used == ["baseline"] * 3


def test_an_unknown_one_is_named() -> None:
    before = torch.ops.llama_adapter_kernels.cpu_instruction_set()
    with pytest.raises(RuntimeError, match=r"instruction set: expected one of baseline.*, got mmx"):
        torch.ops.llama_adapter_kernels.force_cpu_instruction_set("mmx")
    assert torch.ops.llama_adapter_kernels.cpu_instruction_set() == before


def results(problem: Problem) -> list[torch.Tensor]:
    output = problem.forward("cpu")
    return [output.detach(), *problem.backward(output).values()]


def test_another_thread_may_change_it_at_any_time() -> None:
    """The workspace is sized for the kernels that then run: the wider one's is larger, and writing past it shows.

    Each operation is that of one instruction set from end to end. Forward and backward may be of different ones.
    """
    if len(USABLE) < 2:
        pytest.skip("this CPU has one instruction set only")
    problem = make_problem(Case(batch=1, heads_q=1, heads_kv=1, seq_q=3, seq_k=5, head_dim=1, prefix_length=2))
    expected = []
    for name in (USABLE[0], USABLE[-1]):
        with forced(name):
            expected.append(results(problem)[0])
    stop = threading.Event()

    def flip() -> None:
        while not stop.is_set():
            for name in (USABLE[0], USABLE[-1]):
                os.environ["LAK_TEST_OF_THREADS"] = name * 50  # moves the environment, which nobody may be reading
                torch.ops.llama_adapter_kernels.force_cpu_instruction_set(name)

    thread = threading.Thread(target=flip)
    thread.start()
    try:
        for _ in range(500):
            output, *gradients = results(problem)
            assert any(torch.equal(output, one) for one in expected)
            assert not any(gradient.isnan().any() for gradient in gradients)
    finally:
        stop.set()
        thread.join()
        torch.ops.llama_adapter_kernels.force_cpu_instruction_set("")
        del os.environ["LAK_TEST_OF_THREADS"]
