"""Reading and scoring of the tasks, on annotations of their published form."""

import json
from pathlib import Path

import pytest

from llama_adapter_kernels.errors import UserError
from llama_adapter_kernels.evaluation import music_qa, scienceqa, vqa
from llama_adapter_kernels.evaluation.task import Options
from llama_adapter_kernels.evaluation.tasks import TASKS, task_named

SHARED = Path(__file__).parents[3] / "shared" / "data"

QUESTIONS = {
    "7": {"question": "Which is a fruit?", "choices": ["stone", "apple"], "answer": 1, "hint": "", "image": None,
          "grade": "grade2", "subject": "natural science", "split": "test"},
    "8": {"question": "Which place is marked?", "choices": ["Ohio", "Utah", "Iowa"], "answer": 0, "hint": "Look.",
          "image": "image.png", "grade": "grade7", "subject": "social science", "split": "test"},
    "9": {"question": "Which is a verb?", "choices": ["run", "red"], "answer": 0, "hint": "Think.", "image": None,
          "grade": "grade12", "subject": "language science", "split": "val"},
}  # fmt: skip


@pytest.fixture
def science(tmp_path: Path) -> Path:
    (tmp_path / "problems.json").write_text(json.dumps(QUESTIONS))
    (tmp_path / "pid_splits.json").write_text(json.dumps({"test": ["7", "8"], "val": ["9"]}))
    (tmp_path / "test" / "8").mkdir(parents=True)
    (tmp_path / "test" / "8" / "image.png").write_bytes(b"")
    return tmp_path


def test_scienceqa_prompt_and_groups(science: Path) -> None:
    first, second = task_named("scienceqa").read(science, Options())
    assert first.row.instruction == "Question: Which is a fruit?\nContext: N/A\nOptions: (A) stone (B) apple"
    assert first.row.output == "The answer is (B)."
    assert first.facts["groups"] == {"NAT", "NO", "G1-6"}
    assert second.facts["groups"] == {"SOC", "TXT", "IMG", "G7-12"}
    assert second.image == science / "test" / "8" / "image.png"
    assert first.image is None
    assert all(item.image is None for item in task_named("scienceqa").read(science, Options(text_only=True)))


def test_scienceqa_captions_join_the_hint(science: Path) -> None:
    (science / "captions.json").write_text(json.dumps({"captions": {"8": "A map."}}))
    assert "Context: Look. A map." in task_named("scienceqa").read(science, Options())[1].row.instruction


def test_scienceqa_scores(science: Path) -> None:
    task = task_named("scienceqa")
    items = task.read(science, Options())
    scores = {score.name: score for score in task.score(items, ["The answer is (B).", "(C)"], Options())}
    assert scores["Avg"].value == 50.0
    assert (scores["NAT"].value, scores["SOC"].value) == (100.0, 0.0)
    assert (scores["IMG"].value, scores["IMG"].count) == (0.0, 1)
    assert scores["LAN"].value is None
    unreadable = task.score(items, ["no idea", "The answer is A"], Options())[0]
    assert unreadable.value == 50.0
    assert "1 answers" in unreadable.note


def test_scienceqa_accuracy_of_a_published_count() -> None:
    choices = ("a", "b")
    from llama_adapter_kernels.evaluation.task import Item
    from llama_adapter_kernels.training.data import Row

    facts = {"choices": choices, "answer": 0, "groups": {"NAT"}}
    items = [Item(str(i), Row("q"), ("(A)",), facts) for i in range(4241)]
    answers = ["The answer is (A)."] * 3188 + ["The answer is (B)."] * (4241 - 3188)
    assert round(scienceqa.ScienceQA().score(items, answers, Options())[0].value or 0, 2) == 75.17


@pytest.mark.parametrize(
    ("answer", "index"),
    [
        ("The answer is (B).", 1), ("The answer is B", 1), ("(B) apple", 1), ("B. apple", 1), ("apple", 1), ("B", 1),
        ("answer: a", 0), ("The answer is (D).", None), ("A fruit is", 0), ("because", None), ("", None),
    ],
)  # fmt: skip
def test_which_option_an_answer_names(answer: str, index: int | None) -> None:
    assert scienceqa.chosen_option(answer, ["stone", "apple"]) == index


def test_scienceqa_of_another_split_names_both(science: Path) -> None:
    with pytest.raises(UserError, match=r"expected a split train, it has test, val"):
        task_named("scienceqa").read(science, Options(split="train"))
    (science / "pid_splits.json").write_text(json.dumps({"test": ["9"]}))
    with pytest.raises(UserError, match=r"expected split test .*, the question says val"):
        task_named("scienceqa").read(science, Options())
    (science / "pid_splits.json").write_text(json.dumps({"test": ["77"]}))
    with pytest.raises(UserError, match=r"lists 77 in test, problems\.json has no such question"):
        task_named("scienceqa").read(science, Options())


def test_scienceqa_missing_image(science: Path) -> None:
    (science / "test" / "8" / "image.png").unlink()
    with pytest.raises(UserError, match=r"question 8: no file .*image\.png"):
        task_named("scienceqa").read(science, Options())


def test_karpathy_split_and_coco_annotations(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(b"")
    karpathy = {"images": [
        {"filename": "a.jpg", "filepath": "", "cocoid": 1, "split": "test", "sentences": [{"raw": "a bus"}]},
        {"filename": "b.jpg", "filepath": "", "cocoid": 2, "split": "restval", "sentences": [{"raw": "a dog"}]},
    ]}  # fmt: skip
    file = tmp_path / "dataset_coco.json"
    file.write_text(json.dumps(karpathy))
    assert [item.id for item in task_named("captions").read(file, Options())] == ["1"]
    assert [item.id for item in task_named("captions").read(file, Options(split="train"))] == ["2"]
    with pytest.raises(UserError, match="expected a split val, it has restval, test"):
        task_named("captions").read(file, Options(split="val"))
    coco = {"images": [{"id": 3, "file_name": "a.jpg"}], "annotations": [{"image_id": 3, "caption": "one"}]}
    file.write_text(json.dumps(coco))
    (item,) = task_named("captions").read(file, Options())
    assert (item.id, item.references, item.image) == ("3", ("one",), tmp_path / "a.jpg")
    file.write_text(json.dumps({**coco, "annotations": []}))
    with pytest.raises(UserError, match="image 3: no caption"):
        task_named("captions").read(file, Options())


def test_music_scores_have_the_published_quirks() -> None:
    from nltk.translate.bleu_score import sentence_bleu
    from rouge_score.rouge_scorer import RougeScorer

    pairs = [("The song is a slow ballad.", "The song is slow."), ("It is loud", "It is a very loud and long song")]
    expected = sum(sentence_bleu([list(r)], list(a)) for r, a in pairs) / 2
    assert music_qa.character_bleu(pairs) == pytest.approx(expected, rel=1e-12)
    assert music_qa.character_bleu([("abcd", "abcd")]) == pytest.approx(1.0)
    scored = [RougeScorer(["rougeL"], use_stemmer=True).score(r, a)["rougeL"] for r, a in pairs]
    assert music_qa.rouge_recall(pairs) == pytest.approx(sum(s.recall for s in scored) / 2)
    assert music_qa.rouge_f_measure(pairs) == pytest.approx(sum(s.fmeasure for s in scored) / 2)
    assert music_qa.rouge_recall([("loud", "it is loud and long")]) == 1.0
    assert music_qa.rouge_f_measure([("loud", "it is loud and long")]) == pytest.approx(1 / 3)
    assert music_qa.corpus_bleu([("a slow song of love", "a slow song of love")]) == pytest.approx(1.0)


def test_music_scores_without_word_net_or_model_give_reasons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nltk

    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    task = task_named("music_qa")
    rows = [{"audio_name": "1.wav", "conversation": [{"value": "What?"}, {"value": "A song."}]}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    items = task.read(tmp_path / "rows.json", Options(text_only=True))
    options = Options(bertscore_model=str(tmp_path / "no-such-model"))
    scores = {score.name: score for score in task.score(items, ["A song."], options)}
    assert scores["BLEU"].value is not None
    assert scores["ROUGE-L"].value == 1.0
    assert scores["BERTScore"].value is None
    assert scores["BERTScore"].note
    if scores["METEOR"].value is None:  # nltk keeps a corpus that was loaded before
        assert "WordNet" in scores["METEOR"].note


def test_music_rows_that_do_not_fit(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([{"audio_name": "1.wav", "conversation": [{"value": "What?"}]}]))
    with pytest.raises(UserError, match=r"row 1: expected a question and an answer .* got 1 turns"):
        task_named("music_qa").read(file, Options(text_only=True))
    file.write_text(json.dumps([{"audio_name": "1.wav", "conversation": [{"value": "?"}, {"value": "A"}]}]))
    with pytest.raises(UserError, match=r"row 1: no file .*1\.wav"):
        task_named("music_qa").read(file, Options())


@pytest.mark.skipif(not SHARED.exists(), reason="the trial data is not part of the repository")
def test_music_rows_of_the_real_set() -> None:
    items = task_named("music_qa").read(SHARED / "musicqa_eval.json", Options(text_only=True))
    assert len(items) == 5040
    pairs = [(item.references[0], item.references[0]) for item in items[:50]]
    assert music_qa.character_bleu(pairs) == pytest.approx(1.0)


def test_vqa_soft_accuracy() -> None:
    people = ["yes"] * 2 + ["no"] * 8
    # 2 of 10: leaving out one of the two leaves 1/3, leaving out anybody else 2/3.
    assert vqa.soft_accuracy("Yes.", people) == pytest.approx((2 * (1 / 3) + 8 * (2 / 3)) / 10)
    assert vqa.soft_accuracy("no", people) == 1.0
    assert vqa.soft_accuracy("maybe", people) == 0.0
    by_hand = [min(1.0, sum(p == "yes" for p in people[:i] + people[i + 1 :]) / 3) for i in range(10)]
    assert vqa.soft_accuracy("yes", people) == pytest.approx(sum(by_hand) / 10)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("The red bus.", "red bus"), ("Two", "2"), ("dont", "don't"), ("1,000", "1000"), ("1.5", "1.5"), ("a/b?", "b")],
)
def test_vqa_normalisation(answer: str, expected: str) -> None:
    assert vqa.normalized(answer) == expected


def test_vqa_files(tmp_path: Path) -> None:
    question = {"question_id": 5, "image_id": 12, "question": "Which colour?"}
    answers = {"question_id": 5, "answers": [{"answer": "red"}] * 10}
    (tmp_path / "v2_questions.json").write_text(json.dumps({"questions": [question]}))
    (tmp_path / "v2_annotations.json").write_text(json.dumps({"annotations": [answers]}))
    (tmp_path / "COCO_test2014_000000000012.jpg").write_bytes(b"")
    (item,) = task_named("vqa").read(tmp_path, Options())
    assert item.image == tmp_path / "COCO_test2014_000000000012.jpg"
    assert task_named("vqa").score([item], ["Red"], Options())[0].value == 100.0
    (tmp_path / "v2_annotations.json").write_text(json.dumps({"annotations": []}))
    with pytest.raises(UserError, match=r"question 5 has no answers in v2_annotations\.json; expected one split"):
        task_named("vqa").read(tmp_path, Options())


def test_unknown_task() -> None:
    with pytest.raises(UserError, match="expected one of scienceqa, captions, music_qa, vqa, held_out, got 'vqb'"):
        task_named("vqb")
    assert all(task.name == name for name, task in TASKS.items())


@pytest.mark.parametrize("content", ["{", "[" * 100_000, '{"a": ' + "9" * 10_000 + "}", "\x00"])
def test_annotations_that_are_no_json(tmp_path: Path, content: str) -> None:
    file = tmp_path / "rows.json"
    file.write_text(content)
    with pytest.raises(UserError, match=r"rows\.json"):
        task_named("music_qa").read(file, Options())
