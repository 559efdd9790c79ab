"""The pieces of the demo: its text, the shipped model, what it measures, and that training it works."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llama_adapter_kernels.demo import corpus
from llama_adapter_kernels.ops import reference

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


@pytest.mark.parametrize("way", [measure.two_calls, measure.eager])
@pytest.mark.parametrize("masked", [False, True])
def test_the_compared_attentions_compute_the_same(way: object, masked: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    query, key, value, prefix_key, prefix_value = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((2, 6, 7, 8), (2, 2, 7, 8), (2, 2, 7, 8), (1, 2, 3, 8), (1, 2, 3, 8))
    )
    gate = torch.randn(1, 6, generator=generator, dtype=torch.float64)
    mask = torch.rand(2, 1, 7, 7, generator=generator) < 0.7
    mask = mask | torch.eye(7, dtype=torch.bool) if masked else None
    options = {"is_causal": not masked, "scale": 0.3, "attn_mask": mask}
    expected, _ = reference.forward(query, key, value, prefix_key, prefix_value, gate, **options)
    torch.testing.assert_close(way(query, key, value, prefix_key, prefix_value, gate, **options), expected)  # type: ignore[operator]


def test_replacing_the_attention_reaches_the_model_and_ends() -> None:
    """All three ways give the adapted model's loss; and the replacement was really called."""
    model, _ = load_model_and_tokenizer(str(run.BASE_MODEL), torch.float32)
    adapter = run.attach(model, run.SETTINGS)
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            if "gate" in name:
                parameter.fill_(0.7)
    tokens = torch.arange(3, 43)[None]

    def loss() -> float:
        return model(input_ids=tokens, labels=tokens, use_cache=False).loss.item()

    expected, calls = loss(), []
    for way in (measure.two_calls, measure.eager):

        def counted(*tensors: torch.Tensor, way: object = way, **options: object) -> torch.Tensor:
            calls.append(way)
            return way(*tensors, **options)  # type: ignore[operator]

        with measure.attention_replaced(counted):
            assert loss() == pytest.approx(expected, rel=1e-5)
    assert calls.count(measure.two_calls) == calls.count(measure.eager) == model.config.num_hidden_layers
    assert loss() == expected
    assert len(calls) == 2 * model.config.num_hidden_layers


def test_the_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it with fewer steps: the held-out loss falls clearly, the gates leave zero, everything is written."""
    monkeypatch.setattr(measure, "ROUNDS", 1)
    monkeypatch.setattr(measure, "TIMED_SHAPE", (2, 64))
    settings = replace(
        run.SETTINGS, max_steps=24, batch_size=16, base_learning_rate=run.SETTINGS.base_learning_rate * 2
    )
    results = run.run(tmp_path / "demo", settings, held_out_limit=60)
    losses = results.held_out_losses
    assert min(losses) == 0
    assert max(losses) == results.outcome.step == 24
    assert losses[24] < losses[0] - 0.4
    gates = [abs(gate) for layer in results.gates.values() for gate in layer]
    assert len(gates) == 5 * 6
    assert sum(gates) / len(gates) > 0.02
    assert min(gates) > 0
    assert results.outcome.trainable_parameters == 5 * (10 * 192 + 6)
    assert all(answers.before != answers.after for answers in results.answers)
    assert all(0 < seconds < 60 for seconds in results.step_seconds.values())

    report = (tmp_path / "demo" / "report.md").read_text()
    assert report in capsys.readouterr().out
    for said in ("9,630 parameters", f"{losses[0]:.3f} before, {losses[24]:.3f} after", run.SHOWN[0], "| eager |"):
        assert said in report
    for picture in ("loss.png", "gates.png"):
        assert (tmp_path / "demo" / picture).read_bytes().startswith(b"\x89PNG")
    assert math.isfinite(sum(results.outcome.losses.values()))
