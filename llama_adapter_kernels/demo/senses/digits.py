"""Pictures of handwritten digits (scikit-learn carries 1,797 of them, 8 x 8 pixels) and a small ViT trained on some."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import cross_entropy

from llama_adapter_kernels.demo.senses.material import Material, Question, Thing

WORDS = ("Zero", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine")
HELD_OUT, FOR_THE_ENCODER = 297, 1000
EPOCHS = 60
QUESTIONS = (
    Question("Which digit is this?", lambda truth: f"{WORDS[truth[0]]}."),
    Question("Is it larger than five?", lambda truth: "Yes." if truth[0] > 5 else "No."),
    Question("Is it an even number?", lambda truth: "Yes." if truth[0] % 2 == 0 else "No."),
)


def material(folder: Path, progress: Any, epochs: int = EPOCHS) -> Material:
    """Writes pictures and encoder into `folder`.

    Args:
        progress: called with the share of the work that is done.
        epochs: of the encoder's training.
    """
    from sklearn.datasets import load_digits

    pixels, digits = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(digits))
    pictures = folder / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    things = []
    for number in order.tolist():
        path = pictures / f"{number:04d}.png"
        grey = np.round(pixels[number].reshape(8, 8) / 16 * 255).astype(np.uint8)
        Image.fromarray(grey).save(path)
        things.append(Thing(path, (int(digits[number]),)))
    blank = pictures / "blank.png"
    Image.new("L", (8, 8)).save(blank)
    held_out, training = things[:HELD_OUT], things[HELD_OUT:]
    accuracy = train_encoder(training[:FOR_THE_ENCODER], held_out, folder / "encoder", progress, epochs)
    return Material(
        "image", "A LLaMA that sees digits", training, held_out, QUESTIONS, blank, str(folder / "encoder"),
        f"A ViT of 4 layers was trained to name the digit on {FOR_THE_ENCODER:,} of the pictures first (it is right about "
        f"{accuracy:.1%} of the held-out ones), then frozen.",
        "multi_scale", (("depths", 2),),
    )  # fmt: skip


def train_encoder(training: list[Thing], held_out: list[Thing], folder: Path, progress: Any, epochs: int) -> float:
    """Trains a small ViT to name digits and saves it without its classifier; returns its accuracy on `held_out`."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, image_size=8, patch_size=2,
        num_labels=10,
    )  # fmt: skip
    model = ViTForImageClassification(config)
    images, digits = _batch(training)
    batches = -(-len(training) // 64)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, epochs * batches + 1)
    for epoch in range(epochs):
        for chosen in torch.randperm(len(training)).split(64):
            loss = cross_entropy(model(images[chosen]).logits, digits[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        progress((epoch + 1) / epochs)
    model.eval()
    unseen, right = _batch(held_out)
    with torch.no_grad():
        accuracy = float((model(unseen).logits.argmax(-1) == right).float().mean())
    model.vit.save_pretrained(folder)
    processor = {"image_processor_type": "ViTImageProcessor", "do_resize": True, "size": {"height": 8, "width": 8},
                 "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.5] * 3,
                 "image_std": [0.5] * 3}  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return accuracy


def _batch(things: list[Thing]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures [N, 3, 8, 8] from -1 to 1 and their digits, as the saved processor makes them."""
    grey = np.stack([np.asarray(Image.open(thing.path)) for thing in things]).astype(np.float32) / 127.5 - 1
    images = torch.from_numpy(grey)[:, None].expand(-1, 3, -1, -1).contiguous()
    return images, torch.tensor([thing.truth[0] for thing in things])
