"""Forward and backward of the Triton kernels against float64: interpreted everywhere, the same checks on a GPU."""

import pytest
import torch

from llama_adapter_kernels.testing import Case
from tests.support import triton_checks
from tests.support.child_process import RunInChild

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
SMALL = {"batch": 1, "heads_q": 2, "heads_kv": 1}

# (case, dtypes). Interpreting costs a second a case, so each dtype sees every kernel but not every case.
CASES: list[tuple[Case, tuple[torch.dtype, ...]]] = [
    (Case(**SMALL), (SINGLE, HALF, BRAIN)),
    # Lengths around the edges of the tiles (16 and 32); more queries than keys leave rows that see nothing.
    *((Case(**SMALL, seq_q=q, seq_k=k, is_causal=causal), (SINGLE,))
      for q, k, causal in ((1, 33, True), (15, 17, False), (16, 16, True), (31, 32, True), (32, 31, True),
                           (17, 5, True), (5, 50, True), (47, 64, True), (0, 5, True), (5, 0, True))),
    # Prefix lengths around the padded tile, and one that takes several tiles.
    *((Case(**SMALL, prefix_length=p, seq_q=17, seq_k=17), (SINGLE if p % 2 else HALF,))
      for p in (0, 1, 9, 10, 15, 16, 17, 33, 100)),
    # Every prefix form with every gate form.
    *((Case(batch=3, heads_q=2, heads_kv=1, seq_q=17, seq_k=17, prefix=prefix, gate=gate), (SINGLE,))
      for prefix in ("shared", "sequence", "table") for gate in ("scalar", "head", "prefix")),
    # A prefix of several tiles that some sequences have and some do not.
    (Case(batch=3, heads_q=2, heads_kv=1, seq_q=17, seq_k=17, prefix="table", prefix_length=70), (SINGLE,)),
    (Case(**SMALL, prefix="none"), (SINGLE, BRAIN)),
    # Windows and masks.
    *((Case(batch=2, heads_q=2, heads_kv=1, seq_k=50, window=window, is_causal=causal), (SINGLE,))
      for window in ("start", "end", "both") for causal in (True, False)),
    *((Case(batch=2, heads_q=2, heads_kv=1, seq_q=17, mask=mask, is_causal=causal), (dtype,))
      for mask, dtype in (("bool", SINGLE), ("float", HALF), ("row", SINGLE)) for causal in (True, False)),
    (Case(batch=2, heads_q=2, heads_kv=1, seq_q=17, mask="bool", window="both"), (SINGLE,)),
    # Head sizes (padded to a power of two inside), layouts, groups, scales.
    *((Case(**SMALL, seq_q=17, seq_k=17, head_dim=d, layout=layout), (dtype,))
      for d, layout, dtype in ((8, "bshd", HALF), (24, "padded", SINGLE), (64, "bshd", BRAIN), (72, "bshd", SINGLE),
                               (128, "padded", HALF), (256, "bhsd", HALF))),
    *((Case(batch=2, heads_q=q, heads_kv=kv, seq_q=17, seq_k=33), (SINGLE,)) for q, kv in ((2, 2), (6, 2), (4, 1))),
    *((Case(**SMALL, seq_q=17, seq_k=33, scale=scale), (SINGLE,)) for scale in (-0.3, 0.0, 0.5)),
    # Packed sequences, empty ones too.
    *((Case(heads_q=2, heads_kv=1, lengths=lengths, prefix=prefix, gate="prefix", is_causal=causal), (dtype,))
      for lengths, prefix, causal, dtype in (
          (((5, 7), (0, 3), (4, 0), (33, 17)), "table", True, SINGLE),
          (((16, 16), (1, 40), (0, 0)), "sequence", False, HALF),
          (((17, 17), (32, 32)), "shared", True, BRAIN))),
    # One prefix for all, or none: the packed axis is cut into full tiles, whatever sequences lie in them.
    *((Case(heads_q=2, heads_kv=1, lengths=lengths, is_causal=causal, **other), (dtype,))
      for lengths, causal, dtype, other in (
          (((5, 7), (0, 3), (4, 0), (33, 17), (7, 9)), True, SINGLE, {}),
          (((5, 7), (0, 3), (4, 0), (33, 17), (7, 9)), False, SINGLE, {}),
          (((70, 70), (1, 1), (1, 1), (40, 40)), True, HALF, {}),
          (((70, 90), (3, 3)), False, SINGLE, {"prefix": "none"}),
          (((20, 20), (9, 120)), True, SINGLE, {}),  # blocks of keys that all queries see, fewer than a block of queries
          (((3, 3),) * 12, True, SINGLE, {"prefix_length": 1}),
          (((20, 20), (45, 45)), True, HALF, {"prefix_length": 70}),
          (((9, 30), (30, 9)), True, SINGLE, {"scale": -0.4}))),
]  # fmt: skip

BIG = [
    Case(batch=2, heads_q=8, heads_kv=2, seq_q=1000, seq_k=1000, head_dim=64),
    Case(batch=2, heads_q=4, heads_kv=4, seq_q=777, seq_k=1025, head_dim=128, prefix="sequence", layout="bshd"),
    Case(batch=3, heads_q=4, heads_kv=1, seq_q=513, seq_k=700, head_dim=80, prefix="table", window="both"),
    Case(batch=1, heads_q=4, heads_kv=2, seq_q=300, seq_k=300, head_dim=256, prefix_length=130),
    Case(batch=1, heads_q=4, heads_kv=2, seq_q=300, seq_k=300, head_dim=96, mask="float"),
    Case(heads_q=8, heads_kv=2, head_dim=128, lengths=((600, 600), (0, 0), (1, 300), (257, 129)), prefix="table"),
]


@pytest.mark.parametrize(
    ("case", "dtype"), [pytest.param(c, t, id=f"{c.name}-{t}"[:150]) for c, dtypes in CASES for t in dtypes]
)
def test_interpreted(interpreted: RunInChild, case: Case, dtype: torch.dtype) -> None:
    interpreted(triton_checks.attention, case, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [SINGLE, HALF, BRAIN])
@pytest.mark.parametrize("case", [*(case for case, _ in CASES), *BIG], ids=lambda case: case.name[:120])
def test_on_gpu(cuda: torch.device, case: Case, dtype: torch.dtype) -> None:
    triton_checks.attention(case, dtype, "cuda")
