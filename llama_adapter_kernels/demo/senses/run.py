"""A demo of the senses from beginning to end: a frozen language model learns to answer questions about what it is shown."""

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
import typer
from rich.progress import BarColumn, Progress, TimeRemainingColumn

from llama_adapter_kernels.demo.run import BASE_MODEL
from llama_adapter_kernels.demo.senses import digits, melodies
from llama_adapter_kernels.demo.senses.material import Material, Question, Thing
from llama_adapter_kernels.demo.senses.report import Accuracies, Results, accuracy_picture, report, shown_picture
from llama_adapter_kernels.generate import Answerer, Sampling
from llama_adapter_kernels.models import load_model_and_tokenizer
from llama_adapter_kernels.training.loop import train
from llama_adapter_kernels.training.preparation import attach, attach_senses, encoder_of
from llama_adapter_kernels.training.run_folder import check_output, claim, prepare_output
from llama_adapter_kernels.training.settings import Execution, Settings
from llama_adapter_kernels.training.tokens import tokenize

STEPS = 400
SHORT_ANSWER = Sampling(max_new_tokens=8)
MAKERS: dict[str, Callable[..., Material]] = {"image": digits.material, "audio": melodies.material}
SHOWN = 8


def run(output: Path, kind: str, steps: int = STEPS, **sizes: int) -> Results:
    """Runs the demo on the CPU; writes report.md, its pictures, the material and the adapter into `output`.

    Args:
        kind: "image" or "audio".
        steps: of the adapter's training.
        sizes: of the material, for shorter runs.

    Raises:
        UserError: `output` holds something else than an earlier demo.
    """
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    check_output(output, resume=False, overwrite=(output / "run.json").exists())
    torch.set_num_threads(1)  # everything here is small: more threads only wait for each other
    with claim(output):
        prepare_output(output, {"model": "demo", "data_sha256": kind, "settings": {}}, resume=False)
        return _run(output, kind, steps, **sizes)


def _run(output: Path, kind: str, steps: int, **sizes: int) -> Results:
    started = time.monotonic()
    _heading({"image": "Pictures, and a small ViT that learns to see them", "audio": "Melodies"}[kind])
    with _bar("preparing") as progress:
        material = MAKERS[kind](output, progress, **sizes)
    typer.echo(
        f"{len(material.training)} to learn from, {len(material.held_out)} held out. {material.about_the_encoder}"
    )

    _heading("Training: prompts, gates and the conditioning module; the language model stays frozen")
    settings = Settings(
        layers=5, max_steps=steps, epochs=1000, warmup_epochs=0.1, batch_size=16, base_learning_rate=0.8, weight_decay=0.0,
        max_gradient_norm=1.0, max_length=128, conditioning=material.conditioning, conditioning_sizes=material.sizes,
        conditioning_rate=0.06, image_encoder=material.encoder if kind == "image" else None,
        audio_encoder=material.encoder if kind == "audio" else None,
    )  # fmt: skip
    execution = Execution(
        micro_batch_size=16, save_steps=10_000, log_steps=10, tensorboard=False, on_cpu=True,
        features=str(output / "features"),
    )  # fmt: skip
    network, tokenizer = load_model_and_tokenizer(str(BASE_MODEL), torch.float32)
    adapter = attach(network, settings)
    conditioning = attach_senses(network, encoder_of(settings), settings, execution)
    assert conditioning is not None
    assert conditioning.store is not None
    everything = [(thing.path, "") for thing in (*material.training, *material.held_out)]
    with _bar("encoding") as progress:
        conditioning.store.encode_all(everything, lambda done: progress(done / len(everything)))
    rows = [material.row(thing, question) for thing in material.training for question in material.questions]
    examples = tokenize(rows, tokenizer, 128)
    outcome = train(network, adapter, examples, output, settings, execution)

    _heading("Held out: questions about what it has never been shown")
    answerer = Answerer(network, tokenizer)
    with _bar("answering") as progress:
        accuracies, answers = measure(answerer, material, progress)
    results = Results(
        kind=kind,
        title=material.title,
        encoder=material.about_the_encoder,
        training=len(material.training),
        accuracies=accuracies,
        answers=answers,
        outcome=outcome,
        base_parameters=outcome.total_parameters - outcome.trainable_parameters,
        seconds=time.monotonic() - started,
        threads=torch.get_num_threads(),
    )
    accuracy_picture(output / "accuracy.png", results)
    shown_picture(output / "shown.png", results)
    text = report(results)
    (output / "report.md").write_text(text)
    typer.echo("\n" + text)
    thing = material.held_out[0]
    typer.echo(f"Saved: {output}/report.md, accuracy.png, shown.png and the adapter. Try it yourself:")
    typer.echo(f"  llama-adapter generate --model {BASE_MODEL} --adapter {output} --{kind} {thing.path} \\")
    typer.echo(f'    --instruction "{material.questions[0].text}"')
    return results


def measure(
    answerer: Answerer, material: Material, progress: Callable[[float], None]
) -> tuple[list[Accuracies], list[tuple[Thing, list[tuple[str, str, str]]]]]:
    """Accuracy per question with the thing itself, with a blank one and with a wrong one, and the first few answers.

    Of a blank one the answer is the same whatever the truth is. A wrong one is a held-out thing of another truth, so that
    an answer which is right about what is shown is as a rule wrong about what was asked.
    """
    accuracies, answers = [], [(thing, list[tuple[str, str, str]]()) for thing in _different(material.held_out)]
    wrong = _others(material.held_out)
    total = 3 * len(material.questions)
    for number, question in enumerate(material.questions):
        own = _answers(answerer, material, question, [thing.path for thing in material.held_out])
        progress((3 * number + 1) / total)
        (blank,) = _answers(answerer, material, question, [material.blank], material.held_out[:1])
        swapped = _answers(answerer, material, question, [thing.path for thing in wrong])
        progress((3 * number + 3) / total)
        truth = [question.answer(thing.truth) for thing in material.held_out]
        shares = (_share(own, truth), _share([blank] * len(truth), truth), _share(swapped, truth))
        accuracies.append(Accuracies(question.text, *shares, material.chance(question), len(truth)))
        for thing, asked in answers:
            place = material.held_out.index(thing)
            asked.append((question.text, own[place], truth[place]))
    return accuracies, answers


def _answers(
    answerer: Answerer,
    material: Material,
    question: Question,
    shown: Sequence[Path],
    things: Sequence[Thing] | None = None,
) -> list[str]:
    things = material.held_out if things is None else things
    rows = [material.row(thing, question, path) for thing, path in zip(things, shown, strict=True)]
    return [
        answer
        for start in range(0, len(rows), 64)
        for answer in answerer.answer(rows[start : start + 64], SHORT_ANSWER)
    ]


def _different(things: Sequence[Thing]) -> list[Thing]:
    """The first few of different truths, to show."""
    first = {thing.truth: thing for thing in reversed(things)}
    return sorted(first.values(), key=things.index)[:SHOWN]


def _others(things: Sequence[Thing]) -> list[Thing]:
    """For every thing one of another truth: the next in a circle that has one."""
    found = []
    for number, thing in enumerate(things):
        circle = [*things[number + 1 :], *things[:number]]
        found.append(next(other for other in circle if other.truth != thing.truth))
    return found


def _share(answers: Sequence[str], truth: Sequence[str]) -> float:
    return sum(answer == right for answer, right in zip(answers, truth, strict=True)) / len(truth)


class _bar:
    """A progress bar that takes the share of the work that is done."""

    def __init__(self, text: str) -> None:
        self._bar = Progress(text, BarColumn(), TimeRemainingColumn())

    def __enter__(self) -> Callable[[float], None]:
        self._bar.start()
        task = self._bar.add_task("", total=1.0)
        return lambda share: self._bar.update(task, completed=share)

    def __exit__(self, *error: Any) -> None:
        self._bar.stop()


def _heading(text: str) -> None:
    typer.secho(f"\n{text}", bold=True)
