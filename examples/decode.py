"""Decoding: new tokens against a key/value cache, sequences of different lengths in one batch.

    python examples/decode.py

`model.generate` does this for you once an adapter is attached; here is the operation underneath.
"""

import torch

import llama_adapter_kernels as lak

torch.manual_seed(0)
HEADS, KV_HEADS, HEAD_DIM, SLOTS, ROOM = 8, 2, 64, 10, 40
prompts = torch.tensor([24, 7], dtype=torch.int32)  # tokens that each of two sequences begins with
NEW = 12

# What a model's projections would give, token by token, for the whole of both sequences.
query = torch.randn(2, HEADS, ROOM, HEAD_DIM)
key, value = torch.randn(2, 2, KV_HEADS, ROOM, HEAD_DIM)
prefix_key, prefix_value = torch.randn(2, 1, KV_HEADS, SLOTS, HEAD_DIM)
gate = torch.randn(HEADS)

# The cache has room for more tokens than there are: `lengths` says how many of them count.
key_cache, value_cache = torch.full((2, 2, KV_HEADS, ROOM, HEAD_DIM), torch.nan)
for row, length in enumerate(prompts):
    key_cache[row, :, :length], value_cache[row, :, :length] = key[row, :, :length], value[row, :, :length]

lengths, rows, outputs = prompts.clone(), torch.arange(2), []
for _ in range(NEW):
    at = lengths.long()  # the new token's place, another one in each sequence
    key_cache[rows, :, at], value_cache[rows, :, at] = key[rows, :, at], value[rows, :, at]
    lengths += 1
    step = lak.zero_gate_decode(
        query[rows, :, at][:, :, None], key_cache, value_cache, lengths, prefix_key, prefix_value, gate
    )
    outputs.append(step)
decoded = torch.cat(outputs, dim=2)

# One pass over whole sequences gives the same rows.
whole = lak.zero_gate_attention(query, key, value, prefix_key, prefix_value, gate, is_causal=True)
for row, length in enumerate(prompts):
    difference = (decoded[row] - whole[row, :, length : length + NEW]).abs().max()
    print(f"sequence {row}: {NEW} tokens after {length}, at most {difference:.1e} from the whole pass")
    assert difference < 1e-5
