"""The CUDA kernels in the emulator where inputs go to their limits: unused memory, lengths that lie, large scores."""

from dataclasses import replace
from types import ModuleType

import pytest
import torch
from torch import Tensor

from llama_adapter_kernels.testing import Case, Problem, deviations, make_problem
from tests.support.emulated import EmulatedProblem

SMALL = Case(batch=1, heads_q=2, heads_kv=1, head_dim=64)
DTYPES = (torch.bfloat16, torch.float32)


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def everything(emulator: ModuleType, problem: Problem, seed: int = 0, deterministic: bool = False) -> dict[str, Tensor]:
    run = EmulatedProblem(emulator, problem, seed=seed, deterministic=deterministic)
    output, logsumexp = run.forward()
    return {"output": output, "logsumexp": logsumexp} | run.backward()


def assert_within_rule(emulator: ModuleType, problem: Problem, seed: int = 0, deterministic: bool = False) -> None:
    results = everything(emulator, problem, seed, deterministic)
    assert not results.pop("logsumexp").isnan().any()
    bad = [str(deviation) for deviation in deviations(problem, results) if not deviation.ok]
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", ["start", "end", "both"])
def test_windows_without_causality(emulator: ModuleType, window: str, dtype: torch.dtype, deterministic: bool) -> None:
    """The window alone cuts a tile that every row would see whole."""
    case = replace(SMALL, batch=2, seq_q=64, seq_k=200, window=window, is_causal=False)
    problem = make_problem(case, dtype)
    if "key_start" in problem.arguments:
        problem.arguments["key_start"] = int32(60, 125)
    if "key_end" in problem.arguments:
        problem.arguments["key_end"] = int32(130, 187)
    assert_within_rule(emulator, problem, deterministic=deterministic)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_keys_outside_of_the_window_are_not_used(emulator: ModuleType, dtype: torch.dtype, deterministic: bool) -> None:
    """They may be memory that nobody wrote, as in a cache that is not full."""
    problem = make_problem(replace(SMALL, batch=2, seq_q=20, seq_k=140, window="both"), dtype)
    begin, end = (5, 66), (100, 131)
    problem.arguments |= {"key_start": int32(*begin), "key_end": int32(*end)}
    clean = everything(emulator, problem, deterministic=deterministic)
    clean["decoded"] = EmulatedProblem(emulator, problem).decode()
    outside = torch.ones(2, 140, dtype=torch.bool)
    for b in range(2):
        outside[b, begin[b] : end[b]] = False
    for name in ("key", "value"):
        tensor = problem.tensors[name]
        assert tensor is not None
        tensor.data[outside[:, None].expand(tensor.shape[:3])] = torch.nan
    poisoned = everything(emulator, problem, deterministic=deterministic)
    poisoned["decoded"] = EmulatedProblem(emulator, problem).decode()
    for name, result in poisoned.items():
        assert torch.equal(result, clean[name]), name
    for name in ("dkey", "dvalue"):
        assert (poisoned[name][outside[:, None].expand(poisoned[name].shape[:3])] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_key_that_a_mask_hides_may_be_nan(emulator: ModuleType, kind: str, dtype: torch.dtype) -> None:
    """A mask selects and is not only added: -inf + NaN would be NaN."""
    problem = make_problem(replace(SMALL, seq_q=20, seq_k=70, is_causal=False), dtype)
    allowed = torch.ones(20, 70, dtype=torch.bool)
    allowed[:, 3::7] = False
    added = torch.zeros(20, 70).masked_fill(~allowed, -torch.inf)
    problem.arguments["attn_mask"] = allowed if kind == "bool" else added
    clean, _ = EmulatedProblem(emulator, problem).forward()
    key = problem.tensors["key"]
    assert key is not None
    key.data[:, :, 3::7] = torch.nan
    output, logsumexp = EmulatedProblem(emulator, problem).forward()
    assert torch.equal(output, clean) and not logsumexp.isnan().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_prefix_index_out_of_range_is_nan(emulator: ModuleType, dtype: torch.dtype) -> None:
    """Nobody reads the index on the host: that sequence is NaN, its neighbours are not, nothing is out of bounds."""
    case = replace(SMALL, batch=4, seq_q=5, seq_k=5, prefix="table", gate="prefix")
    problem = make_problem(case, dtype)
    problem.arguments["prefix_index"] = int32(1, 3, -2, 2**30)
    results = everything(emulator, problem)
    results["decoded"] = EmulatedProblem(emulator, problem).decode()
    for name in ("output", "decoded", "dquery"):
        assert results[name][0].isfinite().all(), name
        assert results[name][1:].isnan().all(), name
    for name in ("dprefix_key", "dprefix_value", "dgate"):
        assert results[name].isfinite().all(), name
        assert (results[name][1] != 0).any(), name
        assert (results[name][[0, 2]] == 0).all(), f"{name}: no sequence used these entries"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_few_keys_at_the_end_of_memory(emulator: ModuleType, dtype: torch.dtype) -> None:
    """Rows that see few keys read them again, and nothing beside head_dim, after which there may be no memory."""
    assert_within_rule(emulator, make_problem(replace(SMALL, seq_q=5, seq_k=5, head_dim=40), dtype))


def test_decode_of_a_prefix_index_out_of_range(emulator: ModuleType) -> None:
    """Where several splits are added up."""
    problem = make_problem(replace(SMALL, batch=2, seq_q=1, seq_k=600, prefix="table", gate="prefix"), torch.bfloat16)
    problem.arguments["prefix_index"] = int32(1, 3)
    emulator.blocks()
    decoded = EmulatedProblem(emulator, problem).decode()
    assert emulator.blocks()["combine_kernel"][0] > 0
    assert decoded[0].isfinite().all()
    assert decoded[1].isnan().all()


def test_a_table_of_one_prefix_is_not_everybodys(emulator: ModuleType) -> None:
    problem = make_problem(replace(SMALL, lengths=((7, 7), (30, 30), (9, 9)), prefix="table"), torch.bfloat16)
    for name in ("prefix_key", "prefix_value"):
        tensor = problem.tensors[name]
        assert tensor is not None
        problem.tensors[name] = tensor.detach()[:1].clone().requires_grad_()
    problem.arguments["prefix_index"] = int32(0, -1, 0)
    assert_within_rule(emulator, problem)


BAD_PREFIX = {  # dtype, keys, deterministic: which kernel sums dQ
    "words": (torch.bfloat16, 20, False),
    "words, deterministic": (torch.bfloat16, 800, True),
    "words, float32": (torch.float32, 20, False),
    "keys": (torch.bfloat16, 800, False),
}


@pytest.mark.parametrize("kernel", list(BAD_PREFIX))
def test_prefix_index_out_of_range_where_no_key_is_seen(emulator: ModuleType, kernel: str) -> None:
    """The words are nothing then: NaN comes from the index alone, in whichever kernel writes dQ."""
    dtype, keys, deterministic = BAD_PREFIX[kernel]
    case = replace(SMALL, batch=5, seq_q=5, seq_k=keys, prefix="table", gate="prefix")
    problem = make_problem(case, dtype)
    problem.arguments["prefix_index"] = int32(1, 3, -2, 2**30, -1)
    problem.arguments["key_end"] = int32(0, 0, 3, 0, 0)  # of the third the first two rows see none
    emulator.counts()
    results = everything(emulator, problem, deterministic=deterministic)
    assert (emulator.counts()["reductions"] > 0) == (kernel == "keys")
    for name in ("output", "dquery"):
        assert results[name][0].isfinite().all(), name
        assert (results[name][0] != 0).any(), name
        assert results[name][1:4].isnan().all(), name
        assert (results[name][4] == 0).all(), f"{name}: neither keys nor a prefix"
    for name in ("dkey", "dvalue"):
        assert (results[name][[0, 1, 3, 4]] == 0).all(), f"{name}: no query saw these keys"
    for name in ("dprefix_key", "dprefix_value", "dgate"):
        assert results[name].isfinite().all(), name
        assert (results[name][1] != 0).any(), name
        assert (results[name][[0, 2]] == 0).all(), f"{name}: no sequence used these entries"


@pytest.mark.parametrize("name", ["key_start", "key_end"])
def test_wild_windows_are_clamped(emulator: ModuleType, name: str) -> None:
    """As if the nearest sensible value had been given."""
    case = replace(SMALL, batch=3, seq_q=9, seq_k=20)
    wild, sensible = make_problem(case, torch.bfloat16), make_problem(case, torch.bfloat16)
    wild.arguments[name] = int32(-(2**31), 2**31 - 1, 21)
    sensible.arguments[name] = int32(0, 20, 20)
    expected, results = everything(emulator, sensible), everything(emulator, wild)
    expected["decoded"], results["decoded"] = (EmulatedProblem(emulator, p).decode() for p in (sensible, wild))
    for result in results:
        assert torch.equal(results[result], expected[result]), result


def test_wild_windows_that_end_before_they_begin(emulator: ModuleType) -> None:
    """So far before that the difference is no 32-bit number."""
    case = replace(SMALL, batch=3, seq_q=9, seq_k=20)
    wild, sensible = make_problem(case, torch.bfloat16), make_problem(case, torch.bfloat16)
    wild.arguments |= {"key_start": int32(5, 2**31 - 1, -(2**31)), "key_end": int32(-(2**31), 3, 2**31 - 1)}
    sensible.arguments |= {"key_start": int32(5, 20, 0), "key_end": int32(0, 3, 20)}
    expected, results = everything(emulator, sensible), everything(emulator, wild)
    expected["decoded"], results["decoded"] = (EmulatedProblem(emulator, p).decode() for p in (sensible, wild))
    for result in results:
        assert torch.equal(results[result], expected[result]), result


@pytest.mark.parametrize("keys", [200, 0])
@pytest.mark.parametrize("prefix", ["shared", "table"])
def test_tokens_of_no_sequence(emulator: ModuleType, prefix: str, keys: int) -> None:
    """A packed batch of none: every token comes after the last sequence, and offsets has a single entry."""
    problem = make_problem(replace(SMALL, lengths=((200, keys),), prefix=prefix), torch.bfloat16)  # type: ignore[arg-type]
    problem.arguments |= {"cu_seqlens_q": int32(0), "cu_seqlens_k": int32(0)}
    if prefix == "table":
        problem.arguments["prefix_index"] = int32()
    run = EmulatedProblem(emulator, problem)
    run.params["batch"] = 0
    output, logsumexp = run.forward()
    assert (logsumexp == -torch.inf).all()
    for name, result in {"output": output, **run.backward()}.items():
        assert (result == 0).all(), name
    # An offset that lies says where those tokens begin that are nobody's; nothing is read beside it.
    problem.arguments |= {"cu_seqlens_q": int32(9), "cu_seqlens_k": int32(9)}
    run = EmulatedProblem(emulator, problem)
    run.params["batch"] = 0
    run.forward(), run.backward()


@pytest.mark.parametrize("prefix", ["shared", "table"])
def test_whole_tiles_after_the_last_sequence(emulator: ModuleType, prefix: str) -> None:
    """They are zero where the log-sum-exp is asked for, where it is not, and of dQ alone."""
    case = replace(SMALL, lengths=((30, 30), (300, 300)), prefix=prefix)  # type: ignore[arg-type]
    problem = make_problem(case, torch.bfloat16)
    offsets = int32(0, 30, 33)
    problem.arguments |= {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets, "max_seqlen_q": 30, "max_seqlen_k": 30}
    run = EmulatedProblem(emulator, problem)
    output, logsumexp = run.forward()
    assert (logsumexp[:, 33:] == -torch.inf).all()
    dquery = run.backward(need_dkey_dvalue=False, need_dprefix=False)["dquery"]
    again, _ = EmulatedProblem(emulator, problem).forward(need_logsumexp=False)
    assert torch.equal(again, output)
    for result in (output, dquery):
        assert (result[33:] == 0).all()
        assert (result[:33] != 0).any()


WILD_OFFSETS = [(-5, 17), (0, 2**31 - 1), (9, 3), (3, -(2**31)), (2**30, 2**30 + 4), (17, 40)]


@pytest.mark.parametrize("offsets", WILD_OFFSETS, ids=str)
@pytest.mark.parametrize("which", ["cu_seqlens_q", "cu_seqlens_k"])
@pytest.mark.parametrize("prefix", ["shared", "table"])  # token tiles, sequence by sequence
def test_wild_offsets_stay_in_bounds(emulator: ModuleType, which: str, offsets: tuple[int, int], prefix: str) -> None:
    """Offsets that decrease or lie outside of the packed tokens: the emulator reports any access out of bounds."""
    case = replace(SMALL, lengths=((8, 8), (9, 9)), prefix=prefix)  # type: ignore[arg-type]
    problem = make_problem(case, torch.bfloat16)
    problem.arguments[which] = int32(offsets[0], *offsets)
    everything(emulator, problem)


@pytest.mark.parametrize("prefix", ["shared", "table"])
def test_a_sequence_longer_than_promised_stays_in_bounds(emulator: ModuleType, prefix: str) -> None:
    """Its first tokens are right, what comes after the promised ones is nobody's business, but no memory either."""
    case = replace(SMALL, lengths=((300, 300), (9, 9)), prefix=prefix)  # type: ignore[arg-type]
    problem = make_problem(case, torch.bfloat16)
    honest = everything(emulator, problem)
    problem.arguments |= {"max_seqlen_q": 17, "max_seqlen_k": 17}
    results = everything(emulator, problem)
    for rows in (slice(0, 17), slice(300, 309)):
        torch.testing.assert_close(results["output"][rows], honest["output"][rows], rtol=2e-2, atol=1e-3)


def test_backward_without_a_query(emulator: ModuleType) -> None:
    """No block ends with copies in flight, and what nobody used has the gradient zero."""
    results = everything(emulator, make_problem(replace(SMALL, seq_q=0, seq_k=20, is_causal=False), torch.bfloat16))
    for name in ("dkey", "dvalue", "dprefix_key", "dprefix_value", "dgate"):
        assert (results[name] == 0).all(), name


def test_a_prefix_that_nobody_uses_may_be_nan(emulator: ModuleType) -> None:
    """Its sequence has no query: its gradients are zero, and nobody else's are NaN."""
    problem = make_problem(replace(SMALL, lengths=((5, 5), (0, 3)), prefix="sequence", gate="prefix"), torch.bfloat16)
    for name in ("prefix_key", "prefix_value"):
        tensor = problem.tensors[name]
        assert tensor is not None
        tensor.data[1] = torch.nan
    for name, result in everything(emulator, problem).items():
        assert not result.isnan().any(), name
        if "prefix" in name or name == "dgate":
            assert (result[1] == 0).all(), name
            assert (result[0] != 0).any(), name


@pytest.mark.parametrize("prefix", ["shared", "table"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tail_of_packed_rows_is_zero(emulator: ModuleType, dtype: torch.dtype, prefix: str) -> None:
    """Tokens after the last sequence belong to none: they become zero (log-sum-exp -inf), not what memory held."""
    case = replace(SMALL, lengths=((30, 30), (50, 50)), prefix=prefix)  # type: ignore[arg-type]
    problem = make_problem(case, dtype)
    offsets = int32(0, 30, 33)
    problem.arguments |= {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets, "max_seqlen_q": 30, "max_seqlen_k": 30}
    results = everything(emulator, problem)
    assert (results["logsumexp"][:, 33:] == -torch.inf).all()
    for name in ("output", "dquery", "dkey", "dvalue"):
        assert (results[name][33:] == 0).all(), name
        assert (results[name][:33] != 0).any(), name
    results.pop("logsumexp")
    bad = [str(deviation) for deviation in deviations(problem, results) if not deviation.ok]
    assert not bad, "\n".join(bad)


def test_deterministic_gradients_have_one_order(emulator: ModuleType) -> None:
    """Blocks of long sequences add to each query: without the promise they do so in any order, with it in one."""
    problem = make_problem(replace(SMALL, seq_q=70, seq_k=800, is_causal=False), torch.bfloat16)
    emulator.counts()
    runs = [everything(emulator, problem, seed=seed, deterministic=True) for seed in range(3)]
    assert emulator.counts()["reductions"] == 0, "the order of atomic additions is nobody's choice"
    for run in runs[1:]:
        assert all(torch.equal(run[name], runs[0][name]) for name in run)
    everything(emulator, problem, deterministic=False)
    assert emulator.counts()["reductions"] > 0, "the fast path adds with atomics: else this test shows nothing"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decode_where_splits_see_nothing(emulator: ModuleType, dtype: torch.dtype) -> None:
    """No key at all, some that end early in the last split, all of the cache: 3 splits of each, of 5 heads."""
    problem = make_problem(replace(SMALL, batch=3, heads_q=5, head_dim=40, seq_q=3, seq_k=600, window="end"), dtype)
    problem.arguments["key_end"] = int32(0, 130, 600)
    emulator.blocks()
    results = {"output": EmulatedProblem(emulator, problem).decode()}
    assert emulator.blocks()["combine_kernel"][0] == 12, "45 rows by four: the last warps have none"
    bad = [str(deviation) for deviation in deviations(problem, results) if not deviation.ok]
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize("mask_dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_masks_of_every_dtype(emulator: ModuleType, mask_dtype: torch.dtype) -> None:
    problem = make_problem(replace(SMALL, mask="float", is_causal=False), torch.bfloat16)
    problem.arguments["attn_mask"] = problem.arguments["attn_mask"].to(mask_dtype)
    assert_within_rule(emulator, problem)


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_a_scale_that_is_not_positive(emulator: ModuleType, scale: float) -> None:
    """The largest score is then not that of the largest product."""
    assert_within_rule(emulator, make_problem(replace(SMALL, seq_q=70, seq_k=70, scale=scale), torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("where", [0, 70, 290])
@pytest.mark.parametrize("which", ["key", "prefix_key"])
def test_one_dominant_score(emulator: ModuleType, which: str, where: int, dtype: torch.dtype) -> None:
    """A score of some 150 in an early or a late tile: exponentials relative to any other maximum overflow."""
    case = replace(SMALL, seq_q=4, seq_k=300, prefix_length=300, is_causal=False)
    problem = make_problem(case, dtype)
    query, key = problem.tensors["query"], problem.tensors[which]
    assert query is not None
    assert key is not None
    query.data[..., :8] = query.data[..., :8].abs() + 1
    key.data[:, :, where] = 0
    key.data[:, :, where, :8] = 100
    scores = case.head_dim**-0.5 * (query.double() @ key.double()[:, :, where, :, None])
    assert 130 < scores.min() < scores.max() < 400
    assert_within_rule(emulator, problem)
    decoded = EmulatedProblem(emulator, problem, seed=1).decode()
    with torch.no_grad():
        exact = problem.to(torch.float64).forward("reference")
        eager = problem.forward("reference").double()
    eps = torch.finfo(dtype).eps
    limit = 2 * (eager - exact).abs().max() + 2 * eps * exact.abs().max()
    assert (decoded.double() - exact).abs().max() <= limit
