"""Several adapters on one model: one batch in which every sequence has its own, and the base model is among them.

    python examples/many_adapters.py

The adapters here are random; `lak.load_adapter(model, folder, name)` loads trained ones, also while the model serves.
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import llama_adapter_kernels as lak

torch.manual_seed(0)
config = LlamaConfig(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=100, pad_token_id=0
)
model = LlamaForCausalLM(config).eval()

# Adapters may differ in length, gates and layers.
for name, length in (("french", 10), ("haiku", 4)):
    adapter = lak.attach_adapter(model, lak.AdapterConfig(prefix_length=length), name)
    for layer in adapter.layers.values():
        torch.nn.init.constant_(layer.gate, 1.0)  # new adapters begin closed; these should show
    adapter.freeze_prefix()  # for serving: keys and values of the prompts are computed once

prompts = torch.randint(3, 100, (1, 8)).repeat(3, 1)
names = ["french", None, "haiku"]
options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
with lak.adapters_per_sequence(model, names):
    together = model.generate(prompts, **options)

for name, prompt, answer in zip(names, prompts, together, strict=True):
    lak.set_adapter(model, name, trainable=False)
    alone = model.generate(prompt[None], **options)[0]
    same = "the same as alone" if torch.equal(answer, alone) else "not the same as alone"
    print(f"{name or 'base model':12}{answer[8:].tolist()}  {same}")

# An adapter goes when nothing uses it any more.
lak.set_adapter(model, "haiku")
lak.detach_adapter(model, "french")
print("left:", ", ".join(lak.attached_adapters(model)))
