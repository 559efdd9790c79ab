"""Rows that see few keys: what is left of a gradient that is mathematically 0, as docs/operation.md states it."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_adapter_kernels import zero_gate_attention

KEYS, HEAD_DIM = 200, 16
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


@settings(max_examples=60)
@given(st.integers(0, 2**31), DTYPES, st.lists(st.integers(0, KEYS - 1), min_size=2, max_size=4, unique=True))
def test_keys_of_one_value_leave_the_rounding_of_the_output_and_no_more(
    seed: int, dtype: torch.dtype, seen: list[int]
) -> None:
    """All values that a row sees are the same: its output is that value whatever the scores are, so dP - D_w is 0.

    Where the keys lie in one block of 64, D_w comes from the block, and float32 sums are all that rounds. A mask may spread
    them over several: then D_w = rowsum(dO O) has the rounding of the saved output, as in FlashAttention.
    """
    generator = torch.Generator().manual_seed(seed)
    q, k, v, doutput = (torch.randn(1, 1, n, HEAD_DIM, generator=generator).to(dtype) for n in (1, KEYS, KEYS, 1))
    v[:, :, seen] = v[:, :, seen[:1]]
    mask = torch.zeros(1, KEYS, dtype=torch.bool)
    mask[:, seen] = True
    leaves = [tensor.requires_grad_() for tensor in (q, k, v)]
    output = zero_gate_attention(*leaves, None, None, None, attn_mask=mask, backend="cpu")
    dquery, dkey, _ = torch.autograd.grad(output, leaves, doutput)
    products = (doutput.float() * output.float()).abs().sum().item()  # rowsum(|dO O|)
    rounding = 0.0 if len({key // 64 for key in seen}) == 1 else 0.55 * torch.finfo(dtype).eps  # of the saved output
    error_of_delta = (rounding + 8 * torch.finfo(torch.float32).eps) * products
    largest = HEAD_DIM**-0.5 * error_of_delta  # probabilities add up to 1
    assert dquery.abs().max() <= largest * k[:, :, seen].abs().max()
    assert dkey.abs().max() <= largest * q.abs().max()
