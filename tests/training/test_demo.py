"""The pieces of the demo: its text, the shipped model, what it measures, and that training it works."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llama_adapter_kernels.bench.measure import Budget
from llama_adapter_kernels.demo import corpus

pytest.importorskip("matplotlib")
from llama_adapter_kernels.demo import measure, run
from llama_adapter_kernels.models import load_model_and_tokenizer


@pytest.fixture(scope="module")
def entries() -> list[corpus.Entry]:
    return corpus.standard_library()


def test_the_text_is_large_and_well_known_functions_are_in_it(entries: list[corpus.Entry]) -> None:
    names = {entry.name: entry for entry in entries}
    assert len(names) == len(entries) > 6000
    assert names["json.dumps"].summary == "Serialize ``obj`` to a JSON formatted ``str``."
    assert names["json.dumps"].header.startswith("def dumps(obj, *, skipkeys=False")
    assert names["builtins.len"].summary == "Return the number of items in a container."


def test_nothing_held_out_is_trained_on(entries: list[corpus.Entry]) -> None:
    training, held_out = corpus.examples(entries)
    assert len(training) > 3000
    assert 0.03 < len(held_out) / len(training) < 0.12
    assert not {example.name for example in training} & {example.name for example in held_out}
    answers = {" ".join(example.answer.lower().split()).rstrip(".") for example in held_out}
    assert not answers & {" ".join(example.answer.lower().split()).rstrip(".") for example in training}
    text = "\0".join(" ".join(document.lower().split()) for document in corpus.pretraining_documents(entries))
    assert [answer for answer in answers if answer in text] == []
    assert corpus.INSTRUCTION.lower() not in text
    assert "### response" not in text


def test_holding_out_depends_on_the_name_alone() -> None:
    assert [name for name in run.SHOWN if not corpus.is_held_out(name)] == []
    share = sum(corpus.is_held_out(f"module.function_{i}") for i in range(5000)) / 5000
    assert share == pytest.approx(corpus.HELD_OUT_SHARE, abs=0.015)


def test_the_shipped_model_is_small_and_its_making_is_recorded() -> None:
    assert sum(file.stat().st_size for file in run.BASE_MODEL.parent.rglob("*") if file.is_file()) <= 4_000_000
    provenance = json.loads((run.BASE_MODEL / "provenance.json").read_text())
    assert provenance.keys() >= {"python", "torch", "seed", "steps", "text_sha256"}
    model, tokenizer = load_model_and_tokenizer(str(run.BASE_MODEL), torch.float32)
    assert model.config.num_hidden_layers == run.SETTINGS.layers
    text = 'def dumps(obj, *, skipkeys=False):\n    """Serialize obj — done.\n'
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_the_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it with fewer steps: the held-out loss falls clearly, the gates leave zero, everything is written."""
    monkeypatch.setattr(measure, "BUDGET", Budget(0.0, 1, 1))
    monkeypatch.setattr(measure, "TIMED_SHAPE", (2, 64))
    settings = replace(
        run.SETTINGS, max_steps=30, batch_size=16, base_learning_rate=run.SETTINGS.base_learning_rate * 2
    )
    results = run.run(tmp_path / "demo", settings, held_out_limit=60)
    losses = results.held_out_losses
    assert min(losses) == 0
    assert max(losses) == results.outcome.step == 30
    assert losses[30] < losses[0] - 0.4
    gates = [abs(gate) for layer in results.gates.values() for gate in layer]
    assert len(gates) == 5 * 6
    assert sum(gates) / len(gates) > 0.02
    assert min(gates) > 0
    assert results.outcome.trainable_parameters == 5 * (10 * 192 + 6)
    assert all(answers.before != answers.after for answers in results.answers)
    assert {"fused (this package)", "two scaled_dot_product_attention calls", "eager"} <= results.step_seconds.keys()
    assert all(0 < seconds < 60 for seconds in results.step_seconds.values())

    report = (tmp_path / "demo" / "report.md").read_text()
    assert report in capsys.readouterr().out
    for said in ("9,630 parameters", f"{losses[0]:.3f} before, {losses[30]:.3f} after", run.SHOWN[0], "| eager |"):
        assert said in report
    for picture in ("loss.png", "gates.png"):
        assert (tmp_path / "demo" / picture).read_bytes().startswith(b"\x89PNG")
    assert math.isfinite(sum(results.outcome.losses.values()))
