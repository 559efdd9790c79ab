"""Each path of the CUDA launchers in the emulator: long sequences, cards with little shared memory, token tiles."""

from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType

import pytest
import torch

from llama_adapter_kernels.bench.lengths import alpaca_lengths
from llama_adapter_kernels.testing import Case, deviations, make_problem
from tests.cuda.test_cuda_edges import SMALL, assert_within_rule, everything, int32
from tests.support.emulated import EmulatedProblem

HALF = (torch.bfloat16, torch.float16)


@pytest.fixture(params=[80, 86], ids=["A100", "100 KiB a multiprocessor"])
def card(emulator: ModuleType, request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    emulator.set_device(request.param)
    yield emulator
    emulator.set_device()


@pytest.mark.parametrize("head_dim", [40, 64, 72, 128])
def test_long_sequences_add_dquery_across_blocks(card: ModuleType, head_dim: int) -> None:
    case = replace(SMALL, head_dim=head_dim, seq_q=70, seq_k=800, is_causal=head_dim % 64 == 0)
    card.counts()
    assert_within_rule(card, make_problem(case, HALF[head_dim // 8 % 2]))
    assert card.counts()["reductions"] > 0


def test_long_sequences_with_a_long_prefix(emulator: ModuleType) -> None:
    """dQ takes the slots of the prefix tile after tile."""
    case = replace(SMALL, seq_q=70, seq_k=780, prefix_length=33, is_causal=False)
    emulator.counts()
    assert_within_rule(emulator, make_problem(case, torch.bfloat16))
    assert emulator.counts()["reductions"] > 0


@pytest.mark.parametrize(("case", "dtype", "blocks"), [
    (Case(batch=130, heads_q=2, heads_kv=1, head_dim=8, seq_q=3, seq_k=2), torch.float32, 130),
    (Case(batch=65, heads_q=2, heads_kv=2, head_dim=8, seq_q=200, seq_k=0, prefix="sequence"), torch.bfloat16, 260),
], ids=["of all sequences, shared prefix", "of one sequence"])  # fmt: skip
def test_a_block_takes_several_tiles_of_rows(emulator: ModuleType, case: Case, dtype: torch.dtype, blocks: int) -> None:
    """Where there are more than 256: two, and three of a sequence's four. The prefix's gradients are sums over them."""
    run = EmulatedProblem(emulator, problem := make_problem(case, dtype), seed=1)
    emulator.blocks()
    results = run.backward(need_dquery=False, need_dkey_dvalue=False)
    assert emulator.blocks()["backward_rows_kernel"][0] == blocks
    bad = [str(deviation) for deviation in deviations(problem, results) if not deviation.ok]
    assert not bad, "\n".join(bad)


LONG_PACKED = {  # lengths, the prefix, whether dQ is added across blocks: not of token tiles
    "one long sequence, table": (((5, 5), (60, 800), (0, 3), (33, 33), (7, 0)), "table", True),
    "one long sequence, shared": (((5, 5), (60, 800), (0, 3), (33, 33), (7, 0)), "shared", False),
    "long on average, shared": (((40, 900), (3, 700)), "shared", True),
}


@pytest.mark.parametrize("name", list(LONG_PACKED))
def test_long_packed_sequences(card: ModuleType, name: str) -> None:
    lengths, prefix, adds = LONG_PACKED[name]
    problem = make_problem(replace(SMALL, lengths=lengths, prefix=prefix), torch.bfloat16)  # type: ignore[arg-type]
    card.counts()
    assert_within_rule(card, problem)
    assert (card.counts()["reductions"] > 0) == adds


@pytest.mark.parametrize("mask", ["bool", "float"])
def test_long_masked_sequences(emulator: ModuleType, mask: str) -> None:
    case = replace(SMALL, seq_q=20, seq_k=780, mask=mask, is_causal=False)  # type: ignore[arg-type]
    assert_within_rule(emulator, make_problem(case, torch.bfloat16))


@pytest.mark.parametrize("case", [replace(SMALL, head_dim=128, seq_q=150, seq_k=150),
                                  replace(SMALL, head_dim=128, seq_q=20, seq_k=40, prefix_length=33)],
                         ids=lambda case: case.name)  # fmt: skip
def test_forward_on_every_card(card: ModuleType, case: Case) -> None:
    assert_within_rule(card, make_problem(case, torch.bfloat16))


@pytest.mark.parametrize("capability", [80, 86])
def test_forward_takes_the_chosen_tile(emulator: ModuleType, capability: int) -> None:
    """Of 64 keys or of 32, whatever the card would take by itself; a tile costs two barriers of the block."""
    problem = make_problem(replace(SMALL, head_dim=128, seq_q=20, seq_k=256, is_causal=False), torch.bfloat16)

    def barriers() -> int:
        assert_within_rule(emulator, problem)
        run = EmulatedProblem(emulator, problem)
        emulator.counts()
        run.forward()
        return int(emulator.counts()["barriers"])

    emulator.set_device(capability)
    by_itself = barriers()
    try:
        taken = {}
        for keys in (64, 32):
            assert emulator.choose_forward_keys(capability, keys) == 0
            taken[keys] = barriers()
        emulator.set_device(90)
        assert barriers() == taken[64], "a choice for another card changes nothing here"
    finally:
        emulator.choose_forward_keys(capability, 0)
        emulator.set_device()
    assert taken[32] > 1.5 * taken[64]
    assert by_itself == taken[32 if capability == 86 else 64]


@pytest.mark.parametrize(("capability", "keys"), [(80, 48), (80, -64), (75, 64), (-1, 64), (10_000, 64)])
def test_a_tile_that_is_not_there(emulator: ModuleType, capability: int, keys: int) -> None:
    assert "expected 64, 32, or 0" in emulator.error(emulator.choose_forward_keys(capability, keys))


PACKED = {
    "self attention": (tuple((n, n) for n in (1, 63, 2, 64, 130, 1, 5)), True),
    "not causal": (tuple((n, n) for n in (40, 1, 90)), False),
    "other keys": (((3, 70), (80, 5), (1, 0), (0, 9), (64, 64)), True),
    "other keys, not causal": (((70, 3), (2, 100), (9, 0)), False),
}


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", list(PACKED))
def test_token_tiles(emulator: ModuleType, name: str, dtype: torch.dtype, deterministic: bool) -> None:
    """Sequences that begin and end anywhere in a tile."""
    lengths, is_causal = PACKED[name]
    case = replace(SMALL, heads_q=4, heads_kv=2, lengths=lengths, is_causal=is_causal)
    assert_within_rule(emulator, make_problem(case, dtype), deterministic=deterministic)


def test_token_tiles_of_alpaca_lengths(emulator: ModuleType) -> None:
    lengths = tuple((n, n) for n in alpaca_lengths(4))
    assert_within_rule(emulator, make_problem(replace(SMALL, heads_q=1, lengths=lengths), torch.bfloat16), seed=2)


def test_token_tiles_equal_the_path_of_single_sequences(emulator: ModuleType) -> None:
    """The same prefix as the only entry of a table: bits may differ, within the rule of both."""
    problem = make_problem(replace(SMALL, lengths=((5, 5), (80, 80), (1, 1))), torch.bfloat16)
    tiled = everything(emulator, problem)
    problem.arguments["prefix_index"] = int32(0, 0, 0)
    single = everything(emulator, problem)
    assert torch.equal(tiled.pop("logsumexp").isfinite(), single.pop("logsumexp").isfinite())
    for name, result in tiled.items():
        torch.testing.assert_close(result, single[name], rtol=2e-2, atol=2e-2 * single[name].abs().max().item())


def test_a_packed_batch_without_tokens(emulator: ModuleType) -> None:
    results = everything(emulator, make_problem(replace(SMALL, lengths=((0, 0), (0, 0))), torch.bfloat16))
    for name in ("dprefix_key", "dprefix_value", "dgate"):
        assert (results[name] == 0).all(), name
