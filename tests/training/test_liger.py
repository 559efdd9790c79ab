"""liger-kernel's norms, rotary embedding and SwiGLU give the losses and gradients of the model's own."""

from collections.abc import Iterator

import pytest
import torch

from tests.support import liger_checks
from tests.support.child_process import RunInChild, child_process

pytest.importorskip("liger_kernel", reason="liger-kernel is not installed (extra [gpu])")


@pytest.fixture(scope="module")
def interpreted() -> Iterator[RunInChild]:
    for run in child_process(TRITON_INTERPRET="1"):
        run(liger_checks.make_interpretable)
        yield run


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("llama", torch.float32), ("llama", torch.float16), ("qwen3", torch.float32)],
    ids=["llama-float32", "llama-float16", "qwen3-float32"],
)
def test_fused_parts_are_as_exact_as_the_models_own(interpreted: RunInChild, kind: str, dtype: torch.dtype) -> None:
    """Not in bfloat16, which Triton 3.6's interpreter multiplies as integers."""
    exact = liger_checks.gradients(kind, torch.float64, fused=False)
    own = liger_checks.gradients(kind, dtype, fused=False)
    fused = interpreted(liger_checks.gradients, kind, dtype, fused=True)
    for name, value in exact.items():
        base, error = ((found[name].double() - value).abs().max().item() for found in (own, fused))
        assert error <= 2 * base + 2 * torch.finfo(dtype).eps * value.abs().max().item(), name
    assert any(not torch.equal(own[name], fused[name]) for name in exact), "the model's own parts ran"
