"""The tile registers of AMX are shared with whoever else multiplies in this process: torch's matrix products, for one."""

import pytest
import torch

import llama_adapter_kernels as lak
from tests.support.instruction_sets import USABLE, forced

pytestmark = pytest.mark.skipif("amx_bf16" not in USABLE, reason="this CPU has no AMX")


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", [(64, 64, 64), (17, 33, 65), (300, 512, 128)], ids=str)
def test_in_turns_with_matrix_products(threads: int, shape: tuple[int, int, int]) -> None:
    rows, depth, columns = shape
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(rows, depth, generator=generator), torch.randn(depth, columns, generator=generator)
    q, k, v = (torch.randn(1, 4, 70, 64, generator=generator).bfloat16().requires_grad_() for _ in range(3))

    def attention() -> list[torch.Tensor]:
        output = lak.zero_gate_attention(q, k, v, None, None, None, is_causal=True, backend="cpu")
        return [output, *torch.autograd.grad(output.float().square().sum(), (q, k, v))]

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with forced("amx_bf16"):
            product, results = a.bfloat16() @ b.bfloat16(), attention()
            torch.testing.assert_close(
                product.double(), (a.bfloat16().double() @ b.bfloat16().double()), atol=0.5, rtol=0.02
            )
            for _ in range(10):
                assert torch.equal(a.bfloat16() @ b.bfloat16(), product)
                assert all(map(torch.equal, attention(), results))
    finally:
        torch.set_num_threads(before)
