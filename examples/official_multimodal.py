"""The official multimodal checkpoint on a LLaMA of transformers: prompts, gates, tuned norms, and its eyes.

    python examples/official_multimodal.py LLAMA_FOLDER CHECKPOINT.pth picture.jpg [CLIP]

Without arguments the same steps run on a tiny random LLaMA with a made-up checkpoint of the official names and shapes.
"""

import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import llama_adapter_kernels as lak

HIDDEN, LAYERS, HEADS, SLOTS, INNER, WIDTH = (
    64,
    4,
    4,
    10,
    32,
    24,
)  # of the made-up one; LLaMA-7B's: 4096, 32, 32, 10, 768, 768


def made_up(path: Path) -> None:
    block = "visual_blocks.0."
    linears = {"clip_proj": (INNER, WIDTH), "visual_proj": (HIDDEN, INNER), f"{block}attn.qkv": (3 * INNER, INNER),
               f"{block}attn.proj": (INNER, INNER), f"{block}mlp.fc1": (4 * INNER, INNER),
               f"{block}mlp.fc2": (INNER, 4 * INNER)}  # fmt: skip
    norms = {"clip_proj_norm": INNER, "visual_proj_norm": HIDDEN, f"{block}norm1": INNER, f"{block}norm2": INNER}
    shapes = {"adapter_query.weight": ((LAYERS - 1) * SLOTS, HIDDEN), "visual_query.weight": (SLOTS, INNER)}
    shapes |= {f"llama.layers.{layer}.attention.gate": (1, HEADS, 1, 1) for layer in range(LAYERS)}
    for name, shape in (linears | {name: (size,) for name, size in norms.items()}).items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    torch.save({"model": {name: torch.randn(shape) for name, shape in shapes.items()}}, path)


torch.manual_seed(0)
if len(sys.argv) > 3:
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
    lak.load_adapter(model, sys.argv[2])
    senses = lak.load_conditioning(model, sys.argv[2], (sys.argv[4:] or ["openai/clip-vit-large-patch14"])[0])
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
    question = tokenizer("### Instruction:\nWhat is in this picture?\n\n### Response:", return_tensors="pt")
    with senses.seeing([sys.argv[3]]):
        answer = model.generate(**question, max_new_tokens=64, do_sample=False)
    print(tokenizer.decode(answer[0, question["input_ids"].shape[1] :], skip_special_tokens=True))
else:
    checkpoint = Path(tempfile.mkdtemp()) / "7B.pth"
    made_up(checkpoint)
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 96, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=128, **sizes)).eval()
    adapter = lak.load_adapter(model, checkpoint)
    senses = lak.load_conditioning(model, checkpoint)  # without an encoder: features are given
    with torch.no_grad(), senses.given([torch.randn(50, WIDTH)]):
        logits = model(torch.arange(9)[None]).logits
    print("adapted layers:", *adapter.gates(), "- logits with a picture:", tuple(logits.shape))
