"""Makes the demo's base model: a SentencePiece tokenizer and a small Llama, trained on standard-library docstrings.

    python -m llama_adapter_kernels.demo.pretrain --output folder

The shipped model in `assets/` was made by this script; `assets/base/provenance.json` says with which versions and from
which text. It has read definitions and docstrings, never an instruction and never a held-out function.
"""

import copy
import json
import logging
import math
import platform
import time
from pathlib import Path
from typing import Annotated

import sentencepiece
import torch
import transformers
import typer
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from llama_adapter_kernels.demo import corpus

VOCABULARY = 2048
SEQUENCE = 256
BATCH = 8
LEARNING_RATE = 2e-3
WARMUP_STEPS = 100
WEIGHT_DECAY = 0.1
SEED = 20230328

log = logging.getLogger(__name__)


def model_config() -> LlamaConfig:
    """1.85 million parameters: in half precision the file stays below 4 MB. Three query heads share a key head."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=336,
        num_hidden_layers=5,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )


def train_tokenizer(texts: list[str], folder: Path) -> None:
    """Writes `tokenizer.model`, laid out as LLaMA's: bytes as fallback, unk 0, bos 1, eos 2."""
    lines = [line for text in texts for line in text.splitlines() if line.strip()]
    with (folder / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=file,
            model_type="bpe",
            vocab_size=VOCABULARY,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            character_coverage=0.9995,
            num_threads=1,
            minloglevel=2,
        )
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": True,
        "add_eos_token": False,
        "legacy": False,
        "model_max_length": 512,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def token_stream(
    texts: list[str], tokenizer: sentencepiece.SentencePieceProcessor, generator: torch.Generator
) -> Tensor:
    """All documents in a random order as one stream, each between bos and eos."""
    order = torch.randperm(len(texts), generator=generator).tolist()
    encoded = tokenizer.encode([texts[i] for i in order], add_bos=True, add_eos=True)
    return torch.tensor([token for document in encoded for token in document])


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine to a hundredth."""
    if step < WARMUP_STEPS:
        return LEARNING_RATE * (step + 1) / WARMUP_STEPS
    progress = (step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS)
    return LEARNING_RATE * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def pretrain(texts: list[str], held_out: list[str], folder: Path, steps: int) -> dict[str, float]:
    """Trains the model and saves it in float16; returns the losses (nats per token) it ended with.

    On one thread: the order of sums, and with it the result, does not depend on the number of cores.
    """
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(SEED)
    torch.manual_seed(SEED)
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    model = LlamaForCausalLM(model_config())
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() != 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
    )
    validation = token_stream(held_out, tokenizer, torch.Generator().manual_seed(SEED))
    validation = validation[: len(validation) // SEQUENCE * SEQUENCE].view(-1, SEQUENCE)
    blocks = torch.empty(0, SEQUENCE, dtype=torch.long)
    started, running, losses = time.monotonic(), 0.0, {}
    for step in range(steps):
        if len(blocks) < BATCH:  # next epoch: the documents in a new order, cut at new places
            stream = token_stream(texts, tokenizer, generator)
            blocks = stream[: len(stream) // SEQUENCE * SEQUENCE].view(-1, SEQUENCE)
            blocks = blocks[torch.randperm(len(blocks), generator=generator)]
        batch, blocks = blocks[:BATCH], blocks[BATCH:]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        running = loss.item() if step == 0 else 0.98 * running + 0.02 * loss.item()
        if (step + 1) % 200 == 0 or step + 1 == steps:
            losses = {"training_loss": running, "held_out_loss": evaluate(model, validation)}
            log.info("step %d/%d %s %.0f s", step + 1, steps, losses, time.monotonic() - started)
            save(model, folder)
    return losses


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, blocks: Tensor) -> float:
    model.eval()
    losses = [model(input_ids=batch, labels=batch).loss.item() * len(batch) for batch in blocks.split(BATCH)]
    model.train()
    return float(sum(losses) / len(blocks))


def save(model: LlamaForCausalLM, folder: Path) -> None:
    """Writes the weights in half precision; a copy, because half precision would also spoil the rotary frequencies."""
    copy.deepcopy(model).half().save_pretrained(folder)


def main(output: Annotated[Path, typer.Option()], steps: Annotated[int, typer.Option()] = 2800) -> None:
    """Collect the text, train tokenizer and model, write them to OUTPUT with their provenance."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    output.mkdir(parents=True, exist_ok=True)
    entries = corpus.standard_library()
    texts = corpus.pretraining_documents(entries)
    held_out = [corpus.as_source(e) for e in entries if corpus.is_held_out(e.name)]
    log.info("%d documents, %d characters", len(texts), sum(map(len, texts)))
    train_tokenizer(texts, output)
    provenance = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "sentencepiece": sentencepiece.__version__,
        "seed": SEED,
        "steps": steps,
        "tokens_per_step": BATCH * SEQUENCE,
        "documents": len(texts),
        "characters": sum(map(len, texts)),
        "text_sha256": corpus.fingerprint(texts),
    }
    losses = pretrain(texts, held_out, output, steps)
    (output / "provenance.json").write_text(json.dumps({**provenance, **losses}, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
