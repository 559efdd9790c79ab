"""The adapter as a PEFT method: get_peft_model, transformers' Trainer, a checkpoint of the adapter alone, a mixed batch.

    python examples/peft_trainer.py [FOLDER OF A LLAMA, MISTRAL OR QWEN MODEL]

Without an argument it takes the small model that ships with the demo: half a minute on a CPU, nothing is downloaded.
"""

import sys
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import llama_adapter_kernels as lak

MODEL = sys.argv[1] if len(sys.argv) > 1 else str(Path(lak.__file__).parent / "demo" / "assets" / "base")
QUESTION, ANSWER = "Who keeps the books?", "PEFT does."

tokenizer = AutoTokenizer.from_pretrained(MODEL)
asked = tokenizer(f"{QUESTION}\n")["input_ids"]
said = [*tokenizer(ANSWER, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
rows = [{"input_ids": asked + said, "labels": [-100] * len(asked) + said}]


def base_model() -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)


model = get_peft_model(base_model(), lak.ZeroGateConfig(prefix_length=10, task_type="CAUSAL_LM"))
model.print_trainable_parameters()
arguments = TrainingArguments(
    "trainer-output", max_steps=60, learning_rate=0.03, lr_scheduler_type="cosine", logging_steps=20, save_steps=60,
    report_to="none", use_cpu=not torch.cuda.is_available(),
)  # fmt: skip
Trainer(model, arguments, train_dataset=rows).train()
checkpoint = Path("trainer-output", "checkpoint-60")
print(f"{checkpoint.name}: {', '.join(sorted(file.name for file in checkpoint.glob('adapter*')))}")

# Another process would do the same: `import llama_adapter_kernels` makes the method known to PEFT.
model = PeftModel.from_pretrained(base_model(), checkpoint).eval()
tokens = torch.tensor([asked, asked])
inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
output = model.generate(**inputs, adapter_names=["default", "__base__"], max_new_tokens=12, do_sample=False)
answers = [tokenizer.decode(row[len(asked) :], skip_special_tokens=True) for row in output]
print("in one batch, with the adapter:", answers[0])
print("and without:", answers[1])
