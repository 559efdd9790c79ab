"""An encoder: a RoBERTa that knows one task learns another by an adapter and a head; the rest of it stays frozen.

    python examples/roberta_classification.py

The RoBERTa is small and learns here, in seconds, whether more than half of the words of a text are of one kind. In its
place `AutoModelForSequenceClassification.from_pretrained(name, attention_probs_dropout_prob=0)` loads a real one.
"""

import torch
from torch import Tensor
from transformers import RobertaConfig, RobertaForSequenceClassification

import llama_adapter_kernels as lak

torch.manual_seed(0)
config = RobertaConfig(
    vocab_size=24, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.1,
    max_position_embeddings=40, attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0, num_labels=2,
)  # fmt: skip
model = RobertaForSequenceClassification(config)


def batch(rows: int, share: float) -> tuple[Tensor, Tensor, Tensor]:
    """Texts of 9 to 17 words padded on the right; the class says whether more than `share` of the words are below 14."""
    words, mask = torch.randint(4, 24, (rows, 17)), (torch.arange(17) < torch.randint(9, 18, (rows, 1))).long()
    words[:, 0], mask[:, 0] = config.bos_token_id, 0
    classes = ((words < 14) * mask).sum(1) > share * mask.sum(1)
    mask[:, 0] = 1
    return words.where(mask.bool(), config.pad_token_id), mask, classes.long()


def train(share: float, steps: int, rate: float) -> float:
    """Trains what requires a gradient; the share that is right of new texts."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    for _ in range(steps):
        words, mask, classes = batch(64, share)
        optimizer.zero_grad()
        model(words, attention_mask=mask, labels=classes).loss.backward()
        optimizer.step()
    words, mask, classes = batch(500, share)
    with torch.no_grad():
        return float((model(words, attention_mask=mask).logits.argmax(-1) == classes).float().mean())


print(f"more than half, the whole model: {train(0.5, 150, 2e-3):.0%} right")
adapter = lak.attach_adapter(model, lak.AdapterConfig(prefix_length=8), trainable=["classifier"])
print(f"more than two thirds, adapter and head: {train(2 / 3, 60, 1e-2):.0%} right")
print(f"adapter: {adapter.num_parameters():,} of {sum(p.numel() for p in model.parameters()):,} parameters")
