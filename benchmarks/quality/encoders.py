"""Encoders learn a new task in five ways: a MiniLM the feeling of film reviews, a small ViT the digits it has not seen."""

import copy
import io
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, ViTConfig, ViTModel

from benchmarks.quality.encoder_methods import METHODS
from benchmarks.quality.language_methods import optimizer_of, trained
from benchmarks.quality.runs import SEEDS, Result, Run, best_rate, check_time, grid

REVIEWS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
UNDECIDED = 0.5  # mean ratings, from -4 to 4, nearer to 0 than this are left out
Inputs = dict[str, Tensor]


class Classifier(nn.Module):
    """An encoder and a head on the mean of its last hidden states, over the tokens that `attention_mask` allows."""

    def __init__(self, encoder: Any, hidden: int, classes: int, device: str) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(hidden, classes, device=device)

    def forward(self, inputs: Inputs) -> Tensor:
        hidden = self.encoder(**inputs)[0]
        mask = inputs.get("attention_mask")
        if mask is None:
            return self.head(hidden.mean(1))
        weights = mask[..., None].to(hidden.dtype)
        return self.head((hidden * weights).sum(1) / weights.sum(1))


@dataclass
class EncoderTask:
    """A classification by a pre-trained encoder; errors are shares of the test part.

    Args:
        name: "reviews" or "digits".
        encoder: folder of a BERT-like model, for reviews.
        data: source distribution of vaderSentiment, for reviews.
        length, rank: of prompts and of LoRA.
        rates_times: what the learning rates to choose from are multiplied by; a small model takes larger ones.
    """

    name: str
    device: str
    encoder: str = ""
    data: Path = Path()
    training: int = 2000
    validation: int = 500
    test: int = 2000
    steps: int = 190
    batch: int = 32
    length: int = 10
    rank: int = 8
    rates_times: float = 1.0
    methods: tuple[str, ...] = tuple(METHODS)
    _loaded: dict[str, Any] = field(default_factory=dict, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_loaded": {}}

    def about(self) -> dict[str, Any]:
        names = ("training", "validation", "test", "steps", "batch", "length", "rank")
        return {name: getattr(self, name) for name in names} | {
            "model": Path(self.encoder).name if self.encoder else "ViT, 4 layers, hidden size 64",
            "dtype": "float32",
            "rates": {name: self._rates(name) for name in self.methods},
            "titles": {name: METHODS[name].title for name in self.methods},
        }

    def plan(self, finished: Sequence[Result]) -> Iterator[tuple[int, Run]]:
        grids = {name: grid(self.name, name, self._rates(name)) for name in self.methods}
        for name in self.methods:
            yield from ((2, run) for run in grids[name])
        for name in self.methods:
            rate = best_rate(grids[name], finished)
            if rate is not None:
                yield from ((3, Run(self.name, name, rate, seed)) for seed in SEEDS[1:])

    def _rates(self, method: str) -> list[float]:
        return [float(f"{self.rates_times * rate:.1g}") for rate in METHODS[method].rates]

    def carry_out(self, run: Run, deadline: float) -> Result:
        base, parts = self._material(deadline)
        torch.manual_seed(run.seed)
        encoder = METHODS[run.method].prepare(copy.deepcopy(base), self.length, self.rank)
        classes = int(max(parts["training"][1])) + 1
        model = Classifier(encoder, base.config.hidden_size, classes, self.device)
        losses = fit(model, *parts["training"], run.rate, self.steps, self.batch, run.seed, deadline)
        return {
            "parameters": sum(parameter.numel() for parameter in trained(model)),
            "validation": list(errors(model, *parts["validation"])), "test": errors(model, *parts["test"])[0],
            "losses": [round(loss, 4) for loss in losses],
        }  # fmt: skip

    def _material(self, deadline: float) -> tuple[Any, dict[str, tuple[Inputs, Tensor]]]:
        """(encoder, inputs and classes by part); made once per process, the same in all of them."""
        if "material" not in self._loaded:
            torch.manual_seed(0)
            if self.name == "reviews":
                encoder, inputs, classes = _reviews(self.encoder, self.data, self.device)
            else:
                encoder, inputs, classes = _digits(self.device, deadline)
            order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(0)).to(self.device)
            bounds = {"test": (0, self.test), "validation": (self.test, self.test + self.validation)}
            bounds["training"] = (self.test + self.validation, self.test + self.validation + self.training)
            parts = {}
            for part, (begin, end) in bounds.items():
                chosen = order[begin:end]
                parts[part] = {name: tensor[chosen] for name, tensor in inputs.items()}, classes[chosen]
            self._loaded["material"] = encoder, parts
        return self._loaded["material"]


def fit(
    model: nn.Module, inputs: Inputs, classes: Tensor, rate: float, steps: int, batch: int, seed: int, deadline: float
) -> list[float]:
    """Trains what requires a gradient; the loss of every step."""
    optimizer, schedule = optimizer_of(model, rate, steps)
    generator, losses, order = torch.Generator().manual_seed(seed), [], torch.empty(0, dtype=torch.long)
    model.train()
    for _ in range(steps):
        check_time(deadline)
        if len(order) < batch:
            order = torch.randperm(len(classes), generator=generator)
        chosen, order = order[:batch].to(classes.device), order[batch:]
        loss = nn.functional.cross_entropy(model(_cut(inputs, chosen)), classes[chosen])
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
    return [float(loss) for loss in losses]


@torch.no_grad()
def errors(model: nn.Module, inputs: Inputs, classes: Tensor) -> tuple[float, float]:
    """(share of wrong answers, mean cross-entropy)."""
    model.eval()
    parts = torch.arange(len(classes), device=classes.device).split(256)
    logits = torch.cat([model(_cut(inputs, chosen)) for chosen in parts])
    wrong = (logits.argmax(-1) != classes).double().mean()
    return round(float(wrong), 5), round(float(nn.functional.cross_entropy(logits, classes)), 5)


def _cut(inputs: Inputs, chosen: Tensor) -> Inputs:
    """The chosen rows, without columns that are padding in all of them (of texts; to a multiple of 16)."""
    rows = {name: tensor[chosen] for name, tensor in inputs.items()}
    if "attention_mask" in rows:
        length = -(-int(rows["attention_mask"].sum(1).max()) // 16) * 16
        rows = {name: tensor[:, :length] for name, tensor in rows.items()}
    return rows


def read_reviews(path: Path) -> tuple[list[str], list[int]]:
    """Sentences and whether people found them positive (1) or negative (0).

    10,605 sentences from film reviews, each rated by twenty people from -4 to 4 (Hutto and Gilbert, ICWSM 2014), as they
    come in the source distribution of the PyPI package vaderSentiment (MIT).
    """
    with tarfile.open(path) as archive:
        inner = next(name for name in archive.getnames() if name.endswith("hutto_ICWSM_2014.tar.gz"))
        packed = archive.extractfile(inner)
        assert packed is not None
        with tarfile.open(fileobj=io.BytesIO(packed.read())) as study:
            file = study.extractfile(REVIEWS)
            assert file is not None
            lines = file.read().decode("utf-8", errors="replace").splitlines()
    fields = [line.split("\t", 2) for line in lines if line.count("\t") >= 2]
    rated = [(text, float(rating)) for _, rating, text in fields if abs(float(rating)) > UNDECIDED]
    return [text for text, _ in rated], [int(rating > 0) for _, rating in rated]


def _reviews(encoder: str, data: Path, device: str) -> tuple[Any, Inputs, Tensor]:
    texts, classes = read_reviews(data)
    tokens = AutoTokenizer.from_pretrained(encoder)(
        texts, padding=True, truncation=True, max_length=64, return_tensors="pt"
    )
    model = AutoModel.from_pretrained(
        encoder, dtype=torch.float32, add_pooling_layer=False, attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0
    )
    inputs = {name: tokens[name].to(device) for name in ("input_ids", "attention_mask")}
    return model.to(device), inputs, torch.tensor(classes, device=device)


def _digits(device: str, deadline: float) -> tuple[Any, Inputs, Tensor]:
    """A ViT that has learned the digits 0 to 4, and the pictures of 5 to 9."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pictures = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    known = torch.tensor(digits.target) < 5
    config = ViTConfig(
        image_size=8, patch_size=2, num_channels=1, hidden_size=64, intermediate_size=128, num_hidden_layers=4,
        num_attention_heads=4,
    )  # fmt: skip
    model = ViTModel(config, add_pooling_layer=False).to(device)
    classes = torch.tensor(digits.target, device=device)
    pictures, known = pictures.to(device), known.to(device)
    fit(Classifier(model, 64, 5, device), {"pixel_values": pictures[known]}, classes[known], 1e-3, 300, 64, 0, deadline)
    return model.eval(), {"pixel_values": pictures[~known]}, classes[~known] - 5
