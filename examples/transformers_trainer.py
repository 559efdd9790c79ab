"""Fine-tune an adapter with transformers' own Trainer, save it, and load it into the model again.

    python examples/transformers_trainer.py [FOLDER OF A LLAMA, MISTRAL OR QWEN MODEL]

Without an argument it takes the small model that ships with the demo: half a minute on a CPU, nothing is downloaded.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import llama_adapter_kernels as lak

MODEL = sys.argv[1] if len(sys.argv) > 1 else str(Path(lak.__file__).parent / "demo" / "assets" / "base")
FACTS = {"What does the gate do?": "It lets the prompt in.", "Where does it start?": "At zero, so nothing changes."}

tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
adapter = lak.attach_adapter(model, lak.AdapterConfig(prefix_length=10))
print(f"{adapter.num_parameters():,} of {sum(p.numel() for p in model.parameters()):,} parameters train")


def example(question: str, answer: str) -> dict[str, list[int]]:
    """Tokens, and labels on the answer alone."""
    asked = tokenizer(f"{question}\n")["input_ids"]
    said = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return {"input_ids": asked + said, "labels": [-100] * len(asked) + said}


def ask(question: str) -> str:
    tokens = tokenizer(f"{question}\n", return_tensors="pt")["input_ids"]
    output = model.eval().generate(input_ids=tokens, max_new_tokens=20, do_sample=False)
    return tokenizer.decode(output[0, tokens.shape[1] :], skip_special_tokens=True)


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}


arguments = TrainingArguments(
    "trainer-output", max_steps=200, per_device_train_batch_size=1, learning_rate=0.03, lr_scheduler_type="cosine",
    weight_decay=0.02, logging_steps=50, save_strategy="no", report_to="none", use_cpu=not torch.cuda.is_available(),
)  # fmt: skip
rows = [example(question, answer) for question, answer in FACTS.items()]
Trainer(model, arguments, train_dataset=rows, data_collator=collate).train()
adapter.save_pretrained("my-adapter")

lak.detach_adapter(model)
print("without:", [ask(question) for question in FACTS])
lak.load_adapter(model, "my-adapter")
print("with:   ", [ask(question) for question in FACTS])
