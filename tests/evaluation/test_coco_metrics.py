"""BLEU, ROUGE-L and CIDEr-D equal the COCO reference scorer on the same tokens."""

import random
import shutil
from pathlib import Path

import pytest

from llama_adapter_kernels.evaluation import captions, coco_metrics
from llama_adapter_kernels.evaluation.task import Item, Options
from llama_adapter_kernels.training.data import Row

WORDS = ["a", "man", "rides", "the", "horse", "red", "bus", "two", "dogs", "on", "grass", "with"]


def corpus(size: int, seed: int) -> tuple[list[str], list[list[str]]]:
    chance = random.Random(seed)

    def sentence(shortest: int = 1) -> str:
        return " ".join(chance.choices(WORDS, k=chance.randint(shortest, 14)))

    references = [[sentence() for _ in range(chance.randint(1, 5))] for _ in range(size)]
    candidates = [own[0] if chance.random() < 0.2 else sentence() for own in references]
    return candidates, references


@pytest.mark.parametrize(("size", "seed"), [(1, 0), (2, 1), (30, 2), (30, 3), (200, 4)])
def test_equal_the_reference_scorer(size: int, seed: int) -> None:
    pytest.importorskip("pycocoevalcap", reason="the COCO reference scorer is not installed")
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    candidates, references = corpus(size, seed)
    theirs = dict(enumerate(references)), {i: [candidate] for i, candidate in enumerate(candidates)}
    ours = [c.split() for c in candidates], [[r.split() for r in own] for own in references]
    assert coco_metrics.corpus_bleu(*ours) == pytest.approx(Bleu(4).compute_score(*theirs, verbose=0)[0], rel=1e-12)
    assert coco_metrics.rouge_l(*ours) == pytest.approx(Rouge().compute_score(*theirs)[0], rel=1e-12)
    score, each = Cider().compute_score(*theirs)
    assert coco_metrics.cider_d(*ours) == pytest.approx(list(each), rel=1e-9, abs=1e-12)
    assert sum(coco_metrics.cider_d(*ours)) / size == pytest.approx(score, rel=1e-9, abs=1e-12)


def test_values_by_hand() -> None:
    candidate, reference = ["the", "cat", "sat"], ["the", "cat", "sat", "down"]
    other = ["two", "dogs"]
    bleu = coco_metrics.corpus_bleu([candidate, other], [[reference], [other]])
    # All 5 words and all 3 bigrams match; the 5 words stand against 6.
    assert bleu[0] == pytest.approx(2.718281828 ** (1 - 6 / 5), rel=1e-6)
    precision, recall = 1.0, 3 / 4
    assert coco_metrics.rouge_l([candidate], [[reference]]) == pytest.approx(
        (1 + 1.44) * precision * recall / (recall + 1.44 * precision)
    )
    assert coco_metrics.cider_d([reference, other], [[reference], [other]])[0] == pytest.approx(10.0)
    assert coco_metrics.cider_d([other, other], [[reference], [other]])[0] == 0.0


def test_simple_tokens() -> None:
    assert coco_metrics.simple_tokens("A man's dog, re-running; isn't it?") == [
        "a", "man", "'s", "dog", "re-running", "is", "n't", "it",
    ]  # fmt: skip


@pytest.mark.skipif(captions.reference_scorer_missing() is not None, reason=str(captions.reference_scorer_missing()))
def test_with_java_meteor_and_the_reference_tokens() -> None:
    items = [
        Item("1", Row("x"), ("A man rides a red bus.", "The man is on the bus")),
        Item("2", Row("x"), ("Two dogs on the grass", "dogs run on grass!")),
    ]
    scores = {s.name: s for s in captions.Captions().score(items, ["A man rides a bus.", "two dogs"], Options())}
    assert set(scores) == {"BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr"}
    assert all(score.note == "" for score in scores.values())
    assert 20 < (scores["METEOR"].value or 0) < 60


def test_without_java_the_plain_scores_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(captions.util, "find_spec", lambda name: object())
    items = [Item("1", Row("x"), ("a red bus",)), Item("2", Row("x"), ("two dogs",))]
    scores = {s.name: s for s in captions.Captions().score(items, ["a red bus", "two dogs"], Options())}
    assert scores["BLEU-1"].value == pytest.approx(100.0)
    assert scores["METEOR"].value is None
    assert "Java" in scores["METEOR"].note


def test_results_in_the_format_of_the_evaluation_server() -> None:
    items = [Item("42", Row("x"), ("a",), image=Path("42.jpg"))]
    assert captions.coco_results(items, ["a bus"]) == [{"image_id": 42, "caption": "a bus"}]
