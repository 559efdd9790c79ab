"""One backend in a process of its own, half a minute: does it run, and is it right?

    python scripts/gpu_smoke.py cuda             forward, backward, packed sequences and decode against float64, small
    python scripts/gpu_smoke.py cuda --profile   a few large calls without checks, for a profiler

A crash of one backend's kernels ends this process and no other.
"""

import argparse
from dataclasses import replace

import torch

from llama_adapter_kernels import zero_gate_attention, zero_gate_decode
from llama_adapter_kernels.ops import backends
from llama_adapter_kernels.testing import Case, assert_matches_reference, deviations, make_problem

CASES = [
    Case(batch=2, heads_q=4, heads_kv=2, seq_q=65, seq_k=65, head_dim=64),
    Case(batch=1, heads_q=2, heads_kv=1, seq_q=130, seq_k=130, head_dim=128, mask="bool"),
    Case(lengths=((17, 17), (1, 1), (70, 70)), heads_q=4, heads_kv=2, head_dim=64),
]
DECODE = Case(batch=2, heads_q=8, heads_kv=2, seq_q=1, seq_k=300, head_dim=128, window="end")


def smoke(backend: str, device: str) -> None:
    """Prints one line for each problem that was right.

    Raises:
        AssertionError: a result differs from the reference.
        RuntimeError: the backend does not run.
    """
    reason = backends.unavailable_reason(backend, device)
    if reason is not None:
        raise RuntimeError(f"{backend} on {device}: {reason}")
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for case in CASES:
            assert_matches_reference(make_problem(case, dtype, device), backend)
            print(f"right: {backend} {dtype} {case.name}", flush=True)
        problem = make_problem(DECODE, dtype, device)
        tensors = {name: None if t is None else t.detach() for name, t in problem.tensors.items()}
        key, value, arguments = tensors.pop("key"), tensors.pop("value"), dict(problem.arguments)
        output = zero_gate_decode(
            key_cache=key, value_cache=value, cache_lengths=arguments["key_end"], **tensors, backend=backend
        )
        (found,) = deviations(replace(problem, doutput=None), {"output": output})
        assert found.ok, f"decode: {found}"
        print(f"right: {backend} {dtype} decode", flush=True)


def profile(backend: str, device: str) -> None:
    """A training step of a Llama-7B layer's attention at 2048 tokens, and a decode step against 8192 keys, three times."""
    make = {"device": device, "dtype": torch.bfloat16}
    q, k, v = (torch.randn(2, 32, 2048, 128, requires_grad=True, **make) for _ in range(3))
    prefix = [torch.randn(1, 32, 10, 128, requires_grad=True, **make) for _ in range(2)]
    gate = torch.randn(32, device=device, requires_grad=True)
    for _ in range(3):
        zero_gate_attention(q, k, v, *prefix, gate, is_causal=True, backend=backend).sum().backward()
    cache = [torch.randn(8, 32, 8192, 128, **make) for _ in range(2)]
    with torch.no_grad():
        for _ in range(3):
            zero_gate_decode(torch.randn(8, 32, 1, 128, **make), *cache, None, *prefix, gate, backend=backend)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("backend", choices=backends.BACKENDS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    (profile if options.profile else smoke)(options.backend, options.device)
