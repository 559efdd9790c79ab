"""Numbers at the edge of what the formats hold; see `tests.support.triton_extremes`."""

import pytest
import torch

from tests.support import triton_extremes
from tests.support.child_process import RunInChild

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
# (check, arguments)
CHECKS = [
    *((triton_extremes.one_key_has_no_score_gradient, (dtype,)) for dtype in (SINGLE, BRAIN)),
    (triton_extremes.one_key_without_numbers_shows, ()),
    *((triton_extremes.few_keys_keep_their_digits, (dtype,)) for dtype in (HALF, BRAIN)),
    *((triton_extremes.large_scores, (dtype, size, seed))
      for dtype, sizes in ((SINGLE, (10.0, 1000.0)), (BRAIN, (10.0, 100.0, 1000.0)), (HALF, (100.0,)))
      for size in sizes for seed in (0, 1)),
    *((triton_extremes.one_dominant_score, (which, where))
      for which, wheres in (("key", (0, 290)), ("prefix_key", (0, 90))) for where in wheres),
    (triton_extremes.overflowing_output_keeps_gradients, ()),
    (triton_extremes.one_key_of_many_overflows, ()),
]  # fmt: skip
NAMES = [" ".join([check.__name__, *(str(argument).removeprefix("torch.") for argument in arguments)])
         for check, arguments in CHECKS]  # fmt: skip


@pytest.mark.parametrize(("check", "arguments"), CHECKS, ids=NAMES)
def test_interpreted(interpreted: RunInChild, check: RunInChild, arguments: tuple[object, ...]) -> None:
    interpreted(check, *arguments)


@pytest.mark.gpu
@pytest.mark.parametrize(("check", "arguments"), CHECKS, ids=NAMES)
def test_on_gpu(cuda: torch.device, check: RunInChild, arguments: tuple[object, ...]) -> None:
    check(*arguments, "cuda")
