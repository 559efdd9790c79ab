"""The demo's results as a report in Markdown."""

from dataclasses import dataclass
from typing import Any

from llama_adapter_kernels.training.loop import Outcome


@dataclass(frozen=True)
class Answers:
    """What is asked of a held-out function, what its docstring says, and the answers before and after training."""

    signature: str
    docstring: str
    before: str
    after: str


@dataclass(frozen=True)
class Results:
    """Everything that the demo measured. Losses are in nats per response token, by optimizer step."""

    outcome: Outcome
    training_functions: int
    held_out_functions: int
    held_out_losses: dict[int, float]
    gates: dict[int, list[float]]  # layer -> tanh(gate) of each query head
    answers: list[Answers]
    step_seconds: dict[str, float]  # attention -> a training step
    backend: str
    threads: int
    base_model: dict[str, Any]
    seconds: float


def report(results: Results) -> str:
    """The report; it refers to loss.png and gates.png beside it."""
    outcome, losses = results.outcome, results.held_out_losses
    gates = [abs(gate) for layer in results.gates.values() for gate in layer]
    base = outcome.total_parameters - outcome.trainable_parameters
    fused = next(iter(results.step_seconds.values()))
    lines = [
        "# A LLaMA-Adapter, trained on docstrings",
        "",
        f"A base model of {base:,} parameters, pre-trained on the docstrings of Python "
        f"{results.base_model['python']}'s standard library, stays frozen. Trained are "
        f"**{outcome.trainable_parameters:,} parameters** ({outcome.trainable_parameters / base:.2%}): prompts and one "
        "gate per head and layer.",
        "",
        f"- {results.training_functions:,} functions to learn from, {results.held_out_functions:,} held out",
        f"- {outcome.step} steps in {outcome.seconds:.0f} s with backend `{results.backend}` ({results.threads} "
        f"thread{'s' if results.threads > 1 else ''}); the whole demo took {results.seconds:.0f} s",
        f"- held-out loss (nats per response token): **{losses[min(losses)]:.3f} before, {losses[max(losses)]:.3f} "
        "after**",
        f"- gates: 0 before, up to {max(gates):.2f} after (mean of the absolute values {sum(gates) / len(gates):.2f})",
        "",
        "The base model has read the docstrings that it is trained on here, though not as answers; the held-out ones "
        "it has not: hence the distance between the two losses.",
        "",
        "![loss](loss.png)",
        "",
        "![gates](gates.png)",
        "",
        "## Answers about functions that neither pre-training nor training has seen",
        "",
    ]
    for answers in results.answers:
        lines += [
            f"`{answers.signature}`",
            "",
            f"- docstring: {in_code(answers.docstring)}",
            f"- before: {in_code(answers.before)}",
            f"- after: {in_code(answers.after)}",
            "",
        ]
    lines += [
        "The base model is far too small to know what a function does; the adapter teaches it to answer at all.",
        "",
        "## Time of a training step",
        "",
        "A model and adapter of this shape, 8 sequences of 256 tokens; forward, backward and optimizer. Only the way the "
        "adapter's attention is computed differs.",
        "",
        "| attention | ms per step | relative |",
        "|---|---|---|",
        *(
            f"| {name} | {1000 * seconds:.1f} | {seconds / fused:.2f} |"
            for name, seconds in results.step_seconds.items()
        ),
        "",
    ]
    return "\n".join(lines)


def in_code(text: str) -> str:
    """`text` on one line, as Markdown's code."""
    line = " ".join(text.split()).replace("`", "'")
    return f"`{line}`" if line else "(nothing)"
