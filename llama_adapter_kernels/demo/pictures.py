"""The demo's two pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no screen needed
import matplotlib.pyplot as plt
import numpy as np

_BLUE, _ORANGE = "#1f77b4", "#d95f02"


def loss_picture(
    path: Path, training: Mapping[int, float], held_out: Mapping[int, float], label: str = "held-out functions"
) -> None:
    """Training loss by step and held-out loss at the steps where it was measured, in nats per response token.

    Args:
        label: what the held-out loss is of.
    """
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    axes.plot(list(training), list(training.values()), color=_BLUE, linewidth=1, alpha=0.7, label="training")
    axes.plot(list(held_out), list(held_out.values()), color=_ORANGE, marker="o", label=label)
    for step in (min(held_out), max(held_out)):
        axes.annotate(
            f"{held_out[step]:.2f}",
            (step, held_out[step]),
            textcoords="offset points",
            xytext=(0, 9),
            ha="center",
            color=_ORANGE,
        )
    axes.set(
        xlabel="optimizer step",
        ylabel="loss (nats per response token)",
        title="Only prompts and gates are trained; the base model is frozen",
    )
    axes.margins(x=0.08, y=0.12)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def gates_picture(path: Path, gates: Sequence[Sequence[float]], layers: Sequence[int]) -> None:
    """A map of tanh(gate), one row per layer, one column per query head; all were 0 before training."""
    values = np.array(gates)
    limit = max(float(np.abs(values).max()), 1e-6)
    size = (1.6 + 0.75 * values.shape[1], 1.6 + 0.55 * values.shape[0])
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    image = axes.imshow(values, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
    for row, column in np.ndindex(*values.shape):
        color = "white" if abs(values[row, column]) > 0.65 * limit else "black"
        axes.text(column, row, f"{values[row, column]:.2f}", ha="center", va="center", fontsize=8, color=color)
    axes.set_xticks(range(values.shape[1]))
    axes.set_yticks(range(values.shape[0]), [str(layer) for layer in layers])
    axes.set(xlabel="query head", ylabel="layer", title="Gates after training (0 before)")
    figure.colorbar(image, label="tanh(gate)")
    figure.savefig(path, dpi=130)
    plt.close(figure)
