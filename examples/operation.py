"""The operation alone: attention over the words, plus gated attention over a learned prefix, in one pass.

python examples/operation.py
"""

import torch
from torch.nn.functional import scaled_dot_product_attention

import llama_adapter_kernels as lak

torch.manual_seed(0)
BATCH, HEADS, KV_HEADS, WORDS, SLOTS, HEAD_DIM = 2, 8, 2, 128, 10, 64

query = torch.randn(BATCH, HEADS, WORDS, HEAD_DIM)
key, value = torch.randn(2, BATCH, KV_HEADS, WORDS, HEAD_DIM)  # four query heads share a key/value head
prefix_key, prefix_value = torch.randn(2, 1, KV_HEADS, SLOTS, HEAD_DIM)  # one prefix for the whole batch
gate = torch.zeros(HEADS, requires_grad=True)

output = lak.zero_gate_attention(query, key, value, prefix_key, prefix_value, gate, is_causal=True)

# With the gate at zero this is plain attention: training starts from exactly what the model does without an adapter.
plain = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
print(f"gate 0: at most {(output - plain).abs().max():.1e} from plain attention")

# The gate has a gradient all the same, and so training can open it.
output.square().sum().backward()
print("gradient of the gate:", gate.grad)

# Open, it adds the prefix to what the words say: the same as two attention calls and a multiply-add, in one pass.
opened = torch.full((HEADS,), 0.5)
output = lak.zero_gate_attention(query, key, value, prefix_key, prefix_value, opened, is_causal=True)
prefix = scaled_dot_product_attention(
    query, prefix_key.expand(BATCH, -1, -1, -1), prefix_value.expand(BATCH, -1, -1, -1), enable_gqa=True
)
print(f"gate 0.5: at most {(output - (plain + 0.5 * prefix)).abs().max():.1e} from two calls")

# The backend is chosen by device, and can be forced: for one call (backend="...") or for a block.
print("backends for the CPU:", lak.available_backends("cpu"))
with lak.use_backend("reference"):
    slow = lak.zero_gate_attention(query, key, value, prefix_key, prefix_value, opened, is_causal=True)
print(f"the definition in plain PyTorch differs by at most {(output - slow).abs().max():.1e}")
