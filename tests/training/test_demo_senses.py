"""The demos of the senses, shortened; how well they do in full is for `make demo-image` and `make demo-sound` to show."""

from pathlib import Path

import numpy as np
import pytest

from llama_adapter_kernels.demo.senses import digits, melodies, run
from llama_adapter_kernels.demo.senses.material import Material

pytest.importorskip("sklearn", reason="scikit-learn, which carries the digits, is not installed")


@pytest.mark.parametrize(("kind", "sizes"), [("image", {"epochs": 2}), ("audio", {"training": 40, "held_out": 12})])
def test_a_short_demo_ends_with_a_report(kind: str, sizes: dict[str, int], tmp_path: Path) -> None:
    results = run.run(tmp_path / "demo", kind, steps=6, **sizes)
    report = (tmp_path / "demo" / "report.md").read_text()
    for accuracies in results.accuracies:
        assert f"| {accuracies.question} | **{accuracies.own:.1%}**" in report
        assert all(0 <= share <= 1 for share in (accuracies.own, accuracies.blank, accuracies.wrong))
    for name in ("accuracy.png", "shown.png", "adapter.safetensors", "conditioning.safetensors", "conditioning.json"):
        assert (tmp_path / "demo" / name).stat().st_size > 0
    again = run.run(tmp_path / "demo", kind, steps=2, **sizes)  # an earlier demo is replaced
    assert len(again.accuracies) == 3


def test_no_held_out_thing_is_trained_on(tmp_path: Path) -> None:
    material = digits.material(tmp_path, lambda share: None, epochs=1)
    training, held_out = ({thing.path for thing in side} for side in (material.training, material.held_out))
    assert not training & held_out
    assert len(training | held_out) == 1797
    contents = {path.read_bytes() for path in training}
    assert not [path for path in held_out if path.read_bytes() in contents]  # nor one that looks the same


def test_questions_have_the_right_answers(tmp_path: Path) -> None:
    answers = {q.text: [q.answer((d,)) for d in range(10)] for q in digits.QUESTIONS}
    assert answers["Which digit is this?"][7] == "Seven."
    assert answers["Is it larger than five?"] == ["No."] * 6 + ["Yes."] * 4
    assert answers["Is it an even number?"] == ["Yes.", "No."] * 5
    assert [q.answer(("violin", False, True)) for q in melodies.QUESTIONS] == ["A violin.", "Down.", "Fast."]


def test_melodies_are_what_they_say() -> None:
    import random

    def pitches(upwards: bool) -> list[float]:
        wave = melodies.melody("flute", upwards, False, random.Random(3))
        found = []
        for note in np.split(wave, 4):
            spectrum = np.abs(np.fft.rfft(note[1000:-1000]))
            found.append(float(spectrum.argmax()))
        return found

    assert pitches(True) == sorted(pitches(True))
    assert pitches(False) == sorted(pitches(False), reverse=True)
    assert len(set(pitches(True))) == 4


def test_chance_is_that_of_the_best_constant_answer(tmp_path: Path) -> None:
    from llama_adapter_kernels.demo.senses.material import Thing

    things = [Thing(tmp_path / str(d), (d,)) for d in (1, 2, 3, 7)]
    material = Material("image", "", [], things, digits.QUESTIONS, tmp_path, "", "", "multi_scale", ())
    assert [material.chance(q) for q in digits.QUESTIONS] == [0.25, 0.75, 0.75]
    assert all(a.truth != b.truth for a, b in zip(things, run._others(things), strict=True))
