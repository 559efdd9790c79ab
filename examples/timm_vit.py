"""A vision transformer of timm learns new classes with an adapter and a new head; the rest of it stays frozen.

    python examples/timm_vit.py

Pictures: scikit-learn's handwritten digits, 8 by 8. The small ViT learns 0 to 4 first, then 5 to 9 by its adapter.
"""

import timm
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import llama_adapter_kernels as lak

torch.manual_seed(0)
digits = load_digits()
pictures = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
classes = torch.tensor(digits.target)


def train(model: nn.Module, chosen: Tensor, epochs: int, rate: float) -> float:
    """Trains what requires a gradient on four fifths of the chosen pictures; the share that is right of the rest."""
    x, y = pictures[chosen], classes[chosen] % 5
    order, cut = torch.randperm(len(x)), len(x) * 4 // 5
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    model.train()
    for _ in range(epochs):
        for rows in order[:cut][torch.randperm(cut)].split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    with torch.no_grad():
        return float((model.eval()(x[order[cut:]]).argmax(-1) == y[order[cut:]]).float().mean())


model = timm.create_model(
    "vit_tiny_patch16_224", img_size=8, patch_size=4, in_chans=1, embed_dim=48, depth=3, num_heads=4, num_classes=5
)
print(f"0 to 4, the whole model: {train(model, classes < 5, 40, 2e-3):.0%} right")

model.reset_classifier(5)
adapter = lak.attach_adapter(model, lak.AdapterConfig(prefix_length=8), trainable=["head"])
print(f"5 to 9, adapter and head: {train(model, classes >= 5, 40, 1e-2):.0%} right")
print(f"adapter: {adapter.num_parameters():,} of {sum(p.numel() for p in model.parameters()):,} parameters")
