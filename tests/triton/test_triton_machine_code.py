"""The machine code of every kernel, compiled ahead of time for cards that are not here.

By default a representative part of the tuning table is compiled (seconds each); LAK_TEST_ALL_TILES=1 compiles all.
"""

import os

import pytest
import torch

from llama_adapter_kernels.triton_kernels.tuning import SHARED_MEMORY_KIB
from tests.support.child_process import RunInChild

# Matrix instructions a kernel may use. A tile of 16 rows (decode, prefix gradients) is below the 64 rows of a Hopper
# matrix instruction, and there Triton takes the older one.
MATRIX = {"sm80": ("HMMA",), "sm86": ("HMMA",), "sm90": ("HGMMA",), "sm100": ("UTCHMMA",)}
SMALL_TILE_KERNELS = ("decode_split_kernel", "backward_rows_kernel", "backward_prefix_kernel")
WITHOUT_MATRICES = ("decode_combine_kernel", "backward_sums_kernel", "zero_tail_kernel")

# Bytes of local memory a thread may have for registers saved outside of every loop; inside loops there must be none.
# Head_dim 256 on mma.sync cards: the accumulator changes its layout once, for the prefix.
STACK = 256
STACK_OF = {("sm80", 256, "forward_kernel"): 1024, ("sm86", 256, "forward_kernel"): 1024}
# float32 at head_dim 256 has one reload in the forward loop, beside 2590 multiply-adds. The sm_90 tiles of the backward pass
# won their race on an H200 with what they reload (README.md).
SPILLS_OF = {
    **{(card, torch.float32, 256, "forward_kernel"): 1 for card in ("sm80", "sm86", "sm90", "sm100")},
    ("sm90", torch.bfloat16, 128, "backward_words_kernel"): 23,
    ("sm90", torch.bfloat16, 64, "backward_words_kernel"): 78,
}

ALL_TILES = os.environ.get("LAK_TEST_ALL_TILES") == "1"
BRAIN, HALF, SINGLE = torch.bfloat16, torch.float16, torch.float32
TABLE = [
    (card, dtype, head_dim, pass_name)
    for card in ("sm80", "sm86", "sm90", "sm100")
    for dtype, head_dim in ((BRAIN, 64), (BRAIN, 128), (BRAIN, 256), (SINGLE, 64), (SINGLE, 128), (SINGLE, 256))
    for pass_name in ("forward", "backward", "decode")
]
REPRESENTATIVE = [
    *(("sm90", BRAIN, 128, pass_name) for pass_name in ("forward", "backward", "decode")),
    *(("sm80", BRAIN, 128, pass_name) for pass_name in ("forward", "backward")),
    ("sm86", BRAIN, 128, "forward"),
    *(("sm100", BRAIN, 128, pass_name) for pass_name in ("forward", "backward")),
    ("sm90", BRAIN, 64, "forward"),
    ("sm80", SINGLE, 64, "forward"),
]


def _name(value: object) -> str:
    return str(value).removeprefix("torch.")


@pytest.mark.parametrize(("card", "dtype", "head_dim", "pass_name"), TABLE if ALL_TILES else REPRESENTATIVE, ids=_name)
def test_tuning_table(compiled_here: RunInChild, card: str, dtype: torch.dtype, head_dim: int, pass_name: str) -> None:
    from tests.support import ahead_of_time

    for report in compiled_here(ahead_of_time.compile_for, card, dtype, head_dim, pass_name):
        assert report.spills_in_loops <= SPILLS_OF.get((card, dtype, head_dim, report.kernel), 0), report
        assert report.stack <= STACK_OF.get((card, head_dim, report.kernel), STACK), report
        assert report.shared <= SHARED_MEMORY_KIB[card] * 1024, report
        if report.kernel in WITHOUT_MATRICES:
            continue
        if dtype == SINGLE:  # full precision: fused multiply-adds, and no matrix instruction that would round
            assert report.instructions["FFMA"] > 0, report
            assert sum(report.instructions[kind] for kind in ("HMMA", "HGMMA", "UTCHMMA")) == 0, report
        else:
            kinds = ("HMMA", "HGMMA", "UTCHMMA") if report.kernel in SMALL_TILE_KERNELS else MATRIX[card]
            assert any(report.instructions[kind] > 0 for kind in kinds), report
            assert report.instructions["LDGSTS"] > 0 or report.kernel in SMALL_TILE_KERNELS, report
            # From Hopper on, blocks of keys and queries that are seen whole come by descriptors.
            descriptors = card in ("sm90", "sm100") and report.kernel in ("forward_kernel", "backward_words_kernel")
            assert (report.instructions["UTMALDG"] >= 4) == descriptors, report


@pytest.mark.parametrize(
    "options",
    [{"mask": "bool"}, {"varlen": True}, {"window": True, "prefix_length": 100, "is_causal": False}],
    ids=["mask", "varlen", "window"],
)
def test_every_option_compiles(compiled_here: RunInChild, options: dict[str, object]) -> None:
    """Types and shapes of all branches hold; the interpreter does not check them as the compiler does."""
    from tests.support import ahead_of_time

    for pass_name in ("forward", "backward"):
        for report in compiled_here(ahead_of_time.compile_for, "sm80", HALF, 64, pass_name, **options):
            assert report.shared <= SHARED_MEMORY_KIB["sm80"] * 1024
            assert report.spills_in_loops == 0 or "varlen" not in options, report


def test_head_dim_that_is_no_power_of_two_is_copied_16_bytes_at_a_time(compiled_here: RunInChild) -> None:
    from tests.support import ahead_of_time

    (report,) = compiled_here(ahead_of_time.compile_for, "sm80", BRAIN, 72, "forward")
    assert report.instructions["LDGSTS"] >= 16, report


def test_offsets_have_64_bits(compiled_here: RunInChild) -> None:
    """Pointers to tiles of tensors never advance by a 32-bit offset."""
    from tests.support import ahead_of_time

    narrow = compiled_here(ahead_of_time.narrow_tile_offsets, "sm80", BRAIN, 128)
    assert narrow == []
