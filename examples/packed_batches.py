"""Packed batches: sequences of different lengths in one row, without padding, each attending to itself alone.

    python examples/packed_batches.py

Instruction data is short: padded to 512 tokens, three of four token slots of the Alpaca data set hold nothing.
"""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, DataCollatorWithFlattening

import llama_adapter_kernels as lak

torch.manual_seed(0)
model = AutoModelForCausalLM.from_pretrained(
    Path(lak.__file__).parent / "demo" / "assets" / "base", dtype=torch.float32
)
adapter = lak.attach_adapter(model, lak.AdapterConfig(prefix_length=10))
with torch.no_grad():
    for layer in adapter.layers.values():
        layer.gate.fill_(0.5)  # as if trained: at zero a prefix would change nothing

sequences = [torch.randint(3, model.config.vocab_size, (length,)).tolist() for length in (61, 128, 9, 250)]

# transformers' collator puts them in one row and says where each begins; the adapter computes them as they are.
packed = DataCollatorWithFlattening(return_flash_attn_kwargs=True)([{"input_ids": tokens} for tokens in sequences])
print("one row of", packed["input_ids"].shape[1], "tokens; sequences begin at", packed["cu_seq_lens_q"].tolist())
longest = max(len(tokens) for tokens in sequences)
print(f"padded, the same batch would have {len(sequences) * longest}")

model.train()
loss = model(**packed, use_cache=False).loss
loss.backward()
gradient = adapter.layers["0"].prompt.grad.clone()
model.zero_grad()

# One by one the sequences give the same mean loss over tokens, and the same gradients.
tokens_with_loss = sum(len(tokens) - 1 for tokens in sequences)
for tokens in sequences:
    ids = torch.tensor([tokens])
    alone = model(input_ids=ids, labels=ids, use_cache=False).loss * (len(tokens) - 1) / tokens_with_loss
    alone.backward()
difference = (adapter.layers["0"].prompt.grad - gradient).abs().max() / gradient.abs().max()
print(f"loss {loss:.4f}; gradients of the first prompt differ by {difference:.1e} of their size")
assert difference < 1e-4
