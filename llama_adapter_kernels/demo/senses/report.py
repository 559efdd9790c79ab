"""The result of a demo of the senses: a report in Markdown and two pictures."""

from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no screen needed
import matplotlib.pyplot as plt
import numpy as np

from llama_adapter_kernels.demo.senses.material import Thing
from llama_adapter_kernels.training.loop import Outcome

_COLOURS = {"its own": "#1f77b4", "a blank one": "#bbbbbb", "a wrong one": "#d95f02"}


@dataclass(frozen=True)
class Accuracies:
    """Shares of right answers to one question about all held-out things."""

    question: str
    own: float
    blank: float
    wrong: float
    chance: float  # of the best constant answer
    count: int


@dataclass(frozen=True)
class Results:
    """Everything that a demo of the senses measured."""

    kind: str
    title: str
    encoder: str
    training: int
    accuracies: list[Accuracies]
    answers: list[tuple[Thing, list[tuple[str, str, str]]]]  # thing, and for each question (question, answer, truth)
    outcome: Outcome
    base_parameters: int
    seconds: float
    threads: int

    @property
    def noun(self) -> str:
        return {"image": "picture", "audio": "sound"}[self.kind]


def report(results: Results) -> str:
    """The report; it refers to accuracy.png and shown.png beside it."""
    outcome, noun = results.outcome, results.noun
    lines = [
        f"# {results.title}",
        "",
        f"The demo's language model of {results.base_parameters:,} parameters has read nothing but Python's "
        f"documentation, and stays frozen. Trained are **{outcome.trainable_parameters:,} parameters**: prompts, gates, "
        f"and the module that turns the features of a {noun} into prompts. {results.encoder}",
        "",
        f"- {outcome.step} steps of 16 questions in {outcome.seconds:.0f} s; the whole demo took {results.seconds:.0f} s "
        f"({results.threads} thread{'s' if results.threads > 1 else ''})",
        f"- {results.training:,} {noun}s to learn from, {results.accuracies[0].count} held out",
        "",
        f"## Right answers about held-out {noun}s",
        "",
        f"| question | with its own {noun} | with a blank one | with a wrong one | best constant answer |",
        "|---|--:|--:|--:|--:|",
        *(
            f"| {a.question} | **{a.own:.1%}** | {a.blank:.1%} | {a.wrong:.1%} | {a.chance:.1%} |"
            for a in results.accuracies
        ),
        "",
        f"A blank {noun} gets the same answer every time, right as often as that answer happens to be. A wrong one is "
        "another held-out one of different content: the answers follow what is shown, not what was asked about.",
        "",
        "![accuracy](accuracy.png)",
        "",
        f"## The first held-out {noun}s and the answers",
        "",
        f"![{noun}s and answers](shown.png)",
        "",
    ]
    for thing, asked in results.answers:
        answers = "; ".join(f"{q} {a}" + ("" if a == right else f" (wrong: {right})") for q, a, right in asked)
        lines.append(f"- `{thing.path.name}`: {answers}")
    return "\n".join([*lines, ""])


def accuracy_picture(path: Path, results: Results) -> None:
    """Bars per question: with the thing's own file, a blank one, a wrong one; the best constant answer as a line."""
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    values = {"its own": [a.own for a in results.accuracies], "a blank one": [a.blank for a in results.accuracies],
              "a wrong one": [a.wrong for a in results.accuracies]}  # fmt: skip
    places = np.arange(len(results.accuracies))
    for shift, (name, heights) in zip((-0.27, 0.0, 0.27), values.items(), strict=True):
        bars = axes.bar(places + shift, heights, 0.25, color=_COLOURS[name], label=f"with {name}")
        axes.bar_label(bars, [f"{height:.0%}" for height in heights], fontsize=9, padding=2)
    for place, accuracies in zip(places, results.accuracies, strict=True):
        line = axes.hlines(accuracies.chance, place - 0.42, place + 0.42, color="black", linestyle="--", linewidth=1)
    line.set_label("best constant answer")
    axes.set_xticks(places, [a.question for a in results.accuracies])
    axes.set(ylim=(0, 1.12), ylabel="right answers", title=f"{results.title}: held-out {results.noun}s")
    axes.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))
    axes.set_yticks(np.linspace(0, 1, 6))
    axes.grid(axis="y", alpha=0.3)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.09), ncols=4, frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def shown_picture(path: Path, results: Results) -> None:
    """The first held-out things, each with the questions and the answers to them."""
    figure, grid = plt.subplots(2, 4, figsize=(11, 6.6), layout="constrained")
    for axes, (thing, asked) in zip(grid.flat, results.answers, strict=False):
        if results.kind == "image":
            axes.imshow(plt.imread(thing.path), cmap="gray", vmin=0, vmax=1)
        else:
            axes.imshow(_spectrogram(thing.path), origin="lower", aspect="auto", cmap="magma")
        axes.set_xticks([])
        axes.set_yticks([])
        right = all(answer == truth for _, answer, truth in asked)
        text = "\n".join(f"{question} {answer}" for question, answer, _ in asked)
        axes.set_xlabel(text, fontsize=8, color="black" if right else "#c00000")
    figure.suptitle(f"Held-out {results.noun}s and the answers about them (red: one is wrong)")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _spectrogram(path: Path) -> np.ndarray:
    from llama_adapter_kernels.media.audio import read_audio
    from llama_adapter_kernels.media.log_mel import LogMel

    mel = LogMel()
    return np.asarray(mel.frames(read_audio(path, mel.rate)).T)
