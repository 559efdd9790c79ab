"""The CPU kernels against float64 by the tolerance rule, per instruction set, over every argument form and tile edge."""

import ctypes
from dataclasses import replace
from functools import cache

import pytest
import torch

from llama_adapter_kernels import zero_gate_attention, zero_gate_decode
from llama_adapter_kernels.testing import Case, Truth, deviations, make_problem, truth_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SMALL = Case(batch=1, heads_q=2, heads_kv=1)

CASES = [
    # tile edges: 64 queries, 64 keys, 6 rows and whole vectors in a register tile
    *(replace(SMALL, seq_q=s, seq_k=s) for s in (1, 2, 5, 7, 15, 16, 17, 63, 64, 65, 127, 128, 129, 200)),
    *(replace(SMALL, seq_q=q, seq_k=k) for q, k in ((1, 300), (65, 64), (64, 65), (33, 130), (130, 33), (3, 0), (0, 5))),
    *(replace(SMALL, seq_q=70, seq_k=70, head_dim=d) for d in (1, 3, 5, 8, 40, 64, 72, 80, 96, 128, 160, 256)),
    *(replace(SMALL, seq_q=40, seq_k=70, prefix_length=p) for p in (0, 1, 9, 15, 16, 17, 33, 64, 65, 130, 256)),
    # grouped queries
    *(Case(heads_q=q, heads_kv=kv) for q, kv in ((1, 1), (3, 3), (6, 2), (8, 1))),
    # prefix and gate forms
    *(Case(batch=4, prefix=prefix, gate=gate)
      for prefix in ("shared", "sequence", "table") for gate in ("scalar", "head", "prefix")),
    Case(prefix="none"),
    # windows, masks, no causality, layouts
    *(Case(batch=3, seq_q=33, seq_k=70, window=w, is_causal=c) for w in ("start", "end", "both") for c in (False, True)),
    *(Case(mask=m, is_causal=c) for m in ("bool", "float", "row") for c in (False, True)),
    Case(mask="bool", window="both", prefix="table", gate="prefix", batch=3, seq_q=70, seq_k=130),
    *(Case(layout=layout, head_dim=d) for layout in ("bshd", "padded") for d in (24, 64)),
    Case(scale=0.3, is_causal=False),
    Case(scale=-0.2),
    # packed sequences, some of them empty
    Case(lengths=((3, 5), (0, 2), (70, 70), (4, 0), (0, 0), (65, 130))),
    Case(lengths=((5, 5), (64, 64), (1, 1)), prefix="table", gate="prefix"),
    Case(lengths=((5, 9), (64, 10)), prefix="sequence", is_causal=False, head_dim=40),
    # several key ranges in the backward pass
    Case(batch=1, heads_q=2, heads_kv=2, seq_q=600, seq_k=700),
    Case(batch=1, heads_q=4, heads_kv=1, seq_q=520, seq_k=520, window="both", is_causal=False),
]  # fmt: skip
EVERY_DTYPE = CASES[::4]  # float32 runs all of them


@cache
def problem_and_truth(case: Case, dtype: torch.dtype) -> tuple[object, Truth]:
    problem = make_problem(case, dtype)
    return problem, truth_of(problem)


def check(case: Case, dtype: torch.dtype) -> None:
    problem, truth = problem_and_truth(case, dtype)
    output = problem.forward("cpu")
    results = {"output": output} | {f"d{name}": g for name, g in problem.backward(output).items()}
    bad = [str(d) for d in deviations(problem, results, truth) if not d.ok]
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_float32(case: Case, isa: str) -> None:
    check(case, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("case", EVERY_DTYPE, ids=lambda case: case.name)
def test_other_dtypes(case: Case, dtype: torch.dtype, isa: str) -> None:
    check(case, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case(batch=3, heads_q=8, heads_kv=2, seq_q=1, seq_k=300, head_dim=64, window="both"),
        Case(batch=3, heads_q=4, heads_kv=2, seq_q=1, seq_k=65, head_dim=40, prefix="table", window="end"),
        Case(batch=1, heads_q=5, heads_kv=1, seq_q=3, seq_k=1000, head_dim=128, prefix_length=70),
        Case(batch=2, heads_q=2, heads_kv=2, seq_q=8, seq_k=5, head_dim=7, prefix="sequence", gate="prefix"),
        Case(batch=2, heads_q=4, heads_kv=1, seq_q=2, seq_k=700, head_dim=128, layout="bshd"),
        # Three rows are computed as four; head_dims that end in one to four pairs of vectors, or in part of one.
        Case(batch=1, heads_q=3, heads_kv=1, seq_q=1, seq_k=530, head_dim=96),
        Case(batch=1, heads_q=7, heads_kv=1, seq_q=1, seq_k=530, head_dim=80),
        Case(batch=1, heads_q=2, heads_kv=1, seq_q=1, seq_k=530, head_dim=192),
        Case(batch=1, heads_q=2, heads_kv=2, seq_q=1, seq_k=530, head_dim=160),
        Case(batch=2, heads_q=4, heads_kv=4, seq_q=1, seq_k=0, head_dim=16),
        Case(batch=2, heads_q=4, heads_kv=4, seq_q=1, seq_k=64, head_dim=16, prefix="none"),
        Case(batch=2, heads_q=4, heads_kv=4, seq_q=1, seq_k=64, head_dim=16, prefix_length=0, layout="padded"),
    ],
    ids=lambda case: case.name,
)
def test_decode(case: Case, dtype: torch.dtype, isa: str) -> None:
    problem, truth = problem_and_truth(case, dtype)
    t, a = problem.tensors, problem.arguments
    with torch.no_grad():
        output = zero_gate_decode(
            t["query"], t["key"], t["value"], a.get("key_end"), t["prefix_key"], t["prefix_value"], t["gate"],
            scale=a["scale"], prefix_index=a.get("prefix_index"), key_start=a.get("key_start"), backend="cpu",
        )  # fmt: skip
    bad = [str(d) for d in deviations(problem, {"output": output}, truth) if not d.ok]
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dominant", [5, 700, 1290])
def test_decode_with_a_dominant_key_in_any_range(dominant: int, dtype: torch.dtype, isa: str) -> None:
    """Three ranges of keys: the maximum of a row may be in any of them, far above the others'."""
    problem = make_problem(Case(batch=1, heads_q=2, heads_kv=1, seq_q=1, seq_k=1300, head_dim=64), dtype)
    q, k, v, *prefix = (tensor.detach() for tensor in problem.tensors.values())
    for head, factor in ((0, 15.0), (1, -15.0)):  # of the two rows one has it far above, the other far below
        k[0, 0, dominant] += factor * q[0, head, 0]
    scores = (q.double() @ k.double().mT)[0] / 8
    assert scores[0].max() == scores[0, 0, dominant] and scores[0].max() > scores[0].median() + 60
    decoded = zero_gate_decode(q, k, v, None, *prefix, backend="cpu")
    exact = zero_gate_decode(*(t.double() for t in (q, k, v)), None, *(t.double() for t in prefix), backend="reference")
    torch.testing.assert_close(
        decoded.double(), exact, atol=4 * torch.finfo(dtype).eps, rtol=4 * torch.finfo(dtype).eps
    )


def test_every_row_is_written(isa: str) -> None:
    """Buffers that torch fills with NaN before use: what a kernel does not write would show."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(100).isnan().all(), "torch no longer poisons new tensors in deterministic mode"
        for case in (Case(batch=3, window="both", seq_q=70, seq_k=130), Case(lengths=((3, 5), (0, 2), (65, 7))),
                     Case(batch=4, prefix="table", mask="row")):  # fmt: skip
            problem = make_problem(case)
            output = problem.forward("cpu")
            assert not output.isnan().any()
            for name, gradient in problem.backward(output).items():
                assert not gradient.isnan().any(), name
        for case in (Case(batch=3, window="both", seq_q=3, seq_k=700, head_dim=40), Case(seq_q=2, seq_k=0)):
            t, a = make_problem(case).tensors, make_problem(case).arguments
            q, k, v, pk, pv, gate = (tensor.detach() for tensor in t.values())
            decoded = zero_gate_decode(q, k, v, a.get("key_end"), pk, pv, gate, key_start=a.get("key_start"))
            assert not decoded.isnan().any()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("keys", [513, 767, 768, 769, 1279, 1280, 17000])
def test_decode_where_the_number_of_ranges_changes(keys: int, isa: str) -> None:
    """One range up to 767 keys, two up to 1279; 32 are the most. Windows of 1, 700 and all keys beside each other."""
    problem = make_problem(Case(batch=3, heads_q=2, heads_kv=1, seq_q=1, seq_k=keys, head_dim=16))
    q, k, v, *prefix = (tensor.detach() for tensor in problem.tensors.values())
    start = torch.tensor([keys - 1, 0, keys // 700], dtype=torch.int32)
    end = torch.tensor([keys, keys, keys // 700 + 500], dtype=torch.int32)
    decoded = zero_gate_decode(q, k, v, end, *prefix, key_start=start, backend="cpu")
    doubles = [tensor.double() for tensor in (q, k, v, *prefix)]
    exact = zero_gate_decode(*doubles[:3], end, *doubles[3:], key_start=start, backend="reference")
    torch.testing.assert_close(decoded.double(), exact, atol=2e-6, rtol=0)


def test_scratch_memory_is_written_before_it_is_read(isa: str) -> None:
    """The C library fills what it allocates with 0xfe, then with 0x7f: -1.7e38 and 3.4e38, in float16 NaN."""
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt"):
        pytest.skip("only glibc fills memory on request")
    fill = -6  # M_PERTURB; the byte is the complement of the one asked for
    problems = [make_problem(case) for case in (
        Case(batch=3, window="both", seq_q=70, seq_k=130), Case(lengths=((3, 5), (0, 2), (65, 7)), head_dim=40),
        Case(batch=4, prefix="table", mask="row"),
    )]  # fmt: skip
    step = make_problem(Case(batch=3, window="both", seq_q=3, seq_k=1300, head_dim=40))
    q, k, v, *prefix = (tensor.detach() for tensor in step.tensors.values())
    start, end = step.arguments["key_start"], step.arguments["key_end"]

    def results() -> list[torch.Tensor]:
        found = [zero_gate_decode(q, k, v, end, *prefix, key_start=start, backend="cpu")]
        for problem in problems:
            output = problem.forward("cpu")
            found += [output, *problem.backward(output).values()]
        return found

    expected = results()
    try:
        for byte in (0x01, 0x80):
            library.mallopt(fill, byte)
            for result, want in zip(results(), expected, strict=True):
                assert torch.equal(result, want)
    finally:
        library.mallopt(fill, 0)


def test_prefix_padding_is_not_read(isa: str) -> None:
    """NaN behind the P slots of a longer prefix buffer."""
    problem = make_problem(Case(prefix_length=16))
    t = dict(problem.tensors)
    for name in ("prefix_key", "prefix_value"):
        t[name] = t[name].detach().clone()
        t[name][:, :, 10:] = torch.nan
        t[name] = t[name][:, :, :10]
    output = zero_gate_attention(**t, is_causal=True, backend="cpu")
    assert not output.isnan().any()


@pytest.mark.parametrize("mask", [torch.rand(70, 130) < 0.7, torch.randn(70, 130)], ids=["bool", "float"])
def test_masks_of_any_strides(mask: torch.Tensor, isa: str) -> None:
    """Transposed, every second element, broadcast over either side: the same as a contiguous copy."""
    problem = make_problem(Case(seq_q=70, seq_k=130))
    every_second = torch.stack([mask, ~mask if mask.dtype == torch.bool else -mask], dim=-1)[..., 0]
    for strided in (mask.t().contiguous().t(), every_second, mask[:, :1].expand(70, 130), mask[:1].expand(70, 130)):
        assert not strided.is_contiguous()
        results = []
        for form in (strided, strided.contiguous()):
            problem.arguments["attn_mask"] = form
            output = problem.forward("cpu")
            results.append([output, *problem.backward(output).values()])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
