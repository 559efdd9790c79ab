"""Evaluations from the command line: answers, resuming, scoring of given predictions, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from llama_adapter_kernels.cli import app
from llama_adapter_kernels.evaluation import run
from llama_adapter_kernels.evaluation.predictions import Predictions
from llama_adapter_kernels.evaluation.tasks import task_named
from llama_adapter_kernels.generate import Answerer

runner = CliRunner()


@pytest.fixture
def science(tmp_path: Path) -> Path:
    folder = tmp_path / "science"
    folder.mkdir()
    problems = {
        str(n): {"question": f"Which of these {'very ' * n}things?", "choices": ["stone", "apple"], "answer": n % 2,
                 "hint": "", "image": None, "grade": "grade3", "subject": "natural science"}
        for n in range(9)
    }  # fmt: skip
    (folder / "problems.json").write_text(json.dumps(problems))
    (folder / "pid_splits.json").write_text(json.dumps({"test": list(problems)}))
    return folder


def evaluate(*arguments: object) -> list[str]:
    result = runner.invoke(app, ["evaluate", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.output.splitlines()


def test_a_killed_evaluation_ends_with_the_same_answers_and_scores(
    science: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    arguments = (
        "scienceqa",
        "--data",
        science,
        "--model",
        tiny_model,
        "--cpu",
        "--batch-size",
        4,
        "--max-new-tokens",
        5,
    )
    evaluate(*arguments, "--output", whole)
    lines = (whole / "predictions.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == 1 + 9
    cut.mkdir()
    (cut / "predictions.jsonl").write_text("".join(lines[:6]) + lines[6][:10])  # killed while it wrote a line
    asked: list[int] = []
    answer = Answerer.answer
    monkeypatch.setattr(
        Answerer, "answer", lambda self, rows, *rest: asked.append(len(rows)) or answer(self, rows, *rest)
    )
    evaluate(*arguments, "--output", cut)
    assert asked == [4, 1]  # the first batch of four was whole
    for name in ("predictions.jsonl", "scores.jsonl"):
        assert sorted((cut / name).read_text().splitlines()) == sorted((whole / name).read_text().splitlines())


def test_the_model_sees_the_pictures_unless_told_not_to(
    science: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One question of nine has a picture: it alone is shown, and decides about its answer alone."""
    import llama_adapter_kernels as lak
    from llama_adapter_kernels.integrations.conditioning import Conditioning
    from llama_adapter_kernels.models import load_model
    from tests.support.encoders import save_vision

    problems = json.loads((science / "problems.json").read_text())
    problems["4"]["image"] = "image.png"
    (science / "problems.json").write_text(json.dumps(problems))
    (science / "test" / "4").mkdir(parents=True)
    Image.new("RGB", (20, 20), "red").save(science / "test" / "4" / "image.png")
    network = load_model(str(tiny_model), torch.float32)
    adapter = lak.attach_adapter(network, lak.AdapterConfig())
    lak.attach_conditioning(network, str(save_vision(tmp_path / "encoder", "vit")), kind="multi_scale")
    with torch.no_grad():
        for layer in adapter.layers.values():
            layer.gate.fill_(3.0)
        network.zero_gate_conditioning.projection.projection.weight.mul_(30.0)
    adapter.save_pretrained(tmp_path / "adapter")
    shown: list[Path | None] = []
    seeing = Conditioning.seeing
    monkeypatch.setattr(Conditioning, "seeing", lambda self, files: shown.extend(files) or seeing(self, files))
    arguments = ("scienceqa", "--data", science, "--model", tiny_model, "--adapter", tmp_path / "adapter", "--cpu",
                 "--max-new-tokens", 4, "--batch-size", 9)  # fmt: skip
    evaluate(*arguments, "--output", tmp_path / "seen")
    assert [path for path in shown if path] == [science / "test" / "4" / "image.png"]
    shown.clear()
    evaluate(*arguments, "--text-only", "--output", tmp_path / "unseen")
    assert not any(shown)
    lines = [
        {line["id"]: line["prediction"] for line in map(json.loads, path.read_text().splitlines()[1:])}
        for path in (tmp_path / "seen" / "predictions.jsonl", tmp_path / "unseen" / "predictions.jsonl")
    ]
    assert {number for number in lines[0] if lines[0][number] != lines[1][number]} == {"4"}


def test_predictions_of_another_evaluation_are_not_mixed(science: Path, tiny_model: Path, tmp_path: Path) -> None:
    arguments = ["evaluate", "scienceqa", "--data", str(science), "--model", str(tiny_model), "--cpu", "--output",
                 str(tmp_path / "out"), "--max-new-tokens", "2"]  # fmt: skip
    assert runner.invoke(app, arguments).exit_code == 0
    again = runner.invoke(app, [*arguments, "--limit", "3"])
    assert again.exit_code == 2
    assert "items 9" in again.output.replace("\n", " ")
    assert "items 3" in again.output.replace("\n", " ")


def test_scores_of_given_predictions(science: Path, tmp_path: Path) -> None:
    given = tmp_path / "results.json"
    given.write_text(json.dumps({"outputs": {str(n): "The answer is (A)." for n in range(9)}}))
    output = evaluate("scienceqa", "--data", science, "--predictions", given, "--output", tmp_path / "out")
    assert any("55.56" in line for line in output)  # 5 of 9
    assert any("85.19" in line for line in output)  # the published number stands beside it
    scores = [json.loads(line) for line in (tmp_path / "out" / "scores.jsonl").read_text().splitlines()]
    assert scores[0] == {"name": "Avg", "value": 100 * 5 / 9, "count": 9, "note": "", "mode": "correct"}
    given.write_text(json.dumps({"1": "(A)", "77": "(A)"}))
    refused = runner.invoke(app, ["evaluate", "scienceqa", "--data", str(science), "--predictions", str(given)])
    assert refused.exit_code == 2
    assert "8 of them have none and 1 predictions are of other items" in refused.output.replace("\n", " ")


def test_held_out_loss_is_the_models_own(tiny_model: Path, tmp_path: Path) -> None:
    from llama_adapter_kernels.models import load_model_and_tokenizer
    from llama_adapter_kernels.training.data import read_rows
    from llama_adapter_kernels.training.tokens import tokenize

    rows = [{"instruction": f"Say {n}", "output": "one two three" * (n + 1)} for n in range(3)]
    data = tmp_path / "rows.json"
    data.write_text(json.dumps(rows))
    evaluate(
        "held_out", "--data", data, "--model", tiny_model, "--cpu", "--output", tmp_path / "out", "--batch-size", 2
    )
    scores = [json.loads(line) for line in (tmp_path / "out" / "scores.jsonl").read_text().splitlines()]
    model, tokenizer = load_model_and_tokenizer(str(tiny_model), torch.float32)
    total = count = 0.0
    for example in tokenize(read_rows(data), tokenizer, 10_000):
        labels = torch.tensor([example.labels])
        live = int((labels != -100).sum())
        with torch.no_grad():
            total += float(model(input_ids=torch.tensor([example.tokens]), labels=labels).loss) * live
        count += live
    assert scores[0]["value"] == pytest.approx(total / count, rel=1e-5)
    assert scores[1]["value"] == pytest.approx(torch.tensor(total / count).exp().item(), rel=1e-4)
    assert scores[0]["count"] == count


def test_batches_hold_each_item_once(science: Path) -> None:
    from llama_adapter_kernels.evaluation.task import Options

    items = task_named("scienceqa").read(science, Options())
    found = list(run.batches(items, 4))
    assert sorted(number for batch in found for number in batch) == list(range(9))
    lengths = [len(items[number].row.prompt) for batch in found for number in batch]
    assert lengths == sorted(lengths, reverse=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--model, --predictions: expected one of them, got none"),
        (["--model", "x", "--predictions", "y"], "expected one of them, got both"),
        (["--predictions", "y", "--adapter", "z"], "--adapter: expected --model beside it"),
        (["--model", "x", "--mode", "exact"], "--mode: expected correct or paper, got 'exact'"),
        (["--model", "x", "--limit", "0"], "--limit: expected at least 1, got 0"),
        (["--model", "x", "--batch-size", "-1"], "--batch-size: expected at least 1, got -1"),
    ],
)
def test_options_that_do_not_fit(options: list[str], message: str, tmp_path: Path) -> None:
    result = runner.invoke(app, ["evaluate", "scienceqa", "--data", str(tmp_path / "absent"), *options])
    assert result.exit_code == 2
    assert message in result.output.replace("\n", " ")


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    from llama_adapter_kernels.errors import UserError

    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--output"):
        Predictions(tmp_path / "file" / "out", {})
