"""An image-conditioned LLaMA: a frozen vision encoder, a frozen language model, and an adapter that sees.

    python examples/image_conditioned.py

With real models: LLaMA and "openai/clip-vit-large-patch14". Here both are tiny and random, so that it runs anywhere.
"""

import tempfile

import torch
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    LlamaConfig,
    LlamaForCausalLM,
)

import llama_adapter_kernels as lak

torch.manual_seed(0)
folder = tempfile.mkdtemp()
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
CLIPVisionModelWithProjection(CLIPVisionConfig(**sizes, image_size=32, patch_size=8)).save_pretrained(f"{folder}/clip")
CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(
    f"{folder}/clip"
)
Image.new("RGB", (64, 48), "red").save(f"{folder}/red.jpg")

model = LlamaForCausalLM(LlamaConfig(vocab_size=512, **sizes)).eval()
adapter = lak.attach_adapter(model, lak.AdapterConfig(prefix_length=10, num_layers=3))
senses = lak.attach_conditioning(model, f"{folder}/clip", kind="queries", inner_size=64, blocks=2)
# The visual part of an official checkpoint: lak.load_adapter(model, FILE), lak.load_conditioning(model, FILE, CLIP).
for layer in adapter.layers.values():
    layer.gate.data.fill_(0.5)  # as if it had been trained: a gate of 0 sees nothing

tokens = torch.randint(0, 512, (2, 16))
with torch.no_grad(), senses.seeing([f"{folder}/red.jpg", None]):  # the second sequence sees nothing
    seen = model(tokens).logits
with torch.no_grad():
    blind = model(tokens).logits
print(f"with an image: logits differ by {(seen[0] - blind[0]).abs().max():.2f}")
print(f"without one, in the same batch: by {(seen[1] - blind[1]).abs().max():.0e}")

with senses.seeing([f"{folder}/red.jpg", None]):  # generation computes the prompts of an image once
    print("generated:", model.generate(tokens, max_new_tokens=4, do_sample=False, pad_token_id=0).shape)
adapter.save_pretrained(f"{folder}/adapter")  # the conditioning is saved beside it
print("saved: the encoder is named, not copied;", sum(p.numel() for p in senses.parameters()), "parameters of its own")
