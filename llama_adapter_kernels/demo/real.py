"""The demo on a real model: a frozen language model of 135 million parameters, say, learns from instructions."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
import typer
from rich.progress import track
from transformers import TrainerCallback

from llama_adapter_kernels.demo.pictures import gates_picture, loss_picture
from llama_adapter_kernels.demo.report import Answers, in_code
from llama_adapter_kernels.devices import pick_device
from llama_adapter_kernels.errors import UserError
from llama_adapter_kernels.generate import Answerer, Sampling
from llama_adapter_kernels.models import load_model_and_tokenizer, pick_dtype
from llama_adapter_kernels.training.data import Row, read_rows
from llama_adapter_kernels.training.held_out import HeldOut
from llama_adapter_kernels.training.loop import Outcome, train
from llama_adapter_kernels.training.preparation import attach
from llama_adapter_kernels.training.run_folder import RUN_FILE, check_output, claim, prepare_output
from llama_adapter_kernels.training.settings import SCHEDULED_BATCH_SIZE, Execution, Settings
from llama_adapter_kernels.training.tokens import Example, tokenize

HELD_OUT, SHOWN = 32, 4  # rows to measure the loss on, of which some are answered
ROWS_PER_STEP, LEARNING_RATE, MAX_LENGTH = 8, 3e-2, 384  # the rate: best of those in benchmarks/quality
EVALUATIONS = 4  # of the held-out loss while training
GREEDY = Sampling(max_new_tokens=64)
_EVAL_TOKENS = 2048


@dataclass(frozen=True)
class Results:
    """What the demo measured; losses in nats per response token, by optimizer step."""

    model: str
    data: str
    rows: int
    outcome: Outcome
    held_out_losses: dict[int, float]
    gates: dict[int, list[float]]  # layer -> tanh(gate) of each query head
    answers: list[Answers]
    device: str
    dtype: str
    seconds: float


class _Loss:
    """The mean loss of a model on the held-out examples."""

    def __init__(self, examples: list[Example], device: torch.device) -> None:
        self.held_out, self.device = HeldOut(examples, max(_EVAL_TOKENS, *map(len, examples)), 0, 1), device

    def __call__(self, model: Any) -> float:
        total, tokens = self.held_out.sums(model, self.device).tolist()
        return float(total / tokens)


class _Measured(TrainerCallback):
    """Measures the held-out loss a few times during training."""

    def __init__(self, loss: _Loss, steps: int) -> None:
        self.loss, self.every, self.losses = loss, max(1, steps // EVALUATIONS), dict[int, float]()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step % self.every == 0 and state.global_step < state.max_steps:
            self.losses[state.global_step] = self.loss(model)


def run(model: str, data: Path, output: Path, *, steps: int, dtype: str = "auto", device: str = "auto") -> Results:
    """Runs the demo; writes loss.png, gates.png, report.md and the adapter into `output`.

    Args:
        model: a folder or hub name of a causal language model.
        data: instruction rows, of which HELD_OUT are not trained on.
        steps: of ROWS_PER_STEP rows.
        dtype: as for `finetune`.

    Raises:
        UserError: model, data, device or folder do not fit; or there are fewer than twice HELD_OUT rows.
    """
    if steps < 1:
        raise UserError(f"--steps: expected at least 1, got {steps}")
    place = pick_device(device)
    rows = read_rows(data)
    if len(rows) < 2 * HELD_OUT:
        raise UserError(
            f"--data {data}: expected at least {2 * HELD_OUT} rows, {HELD_OUT} to hold out; got {len(rows)}"
        )
    transformers.utils.logging.disable_progress_bar()  # of the loading; training shows its own
    check_output(output, resume=False, overwrite=(output / RUN_FILE).exists())
    with claim(output):
        return _run(model, data, rows, output, steps, pick_dtype(dtype, on_cpu=place.type == "cpu"), place)


def _run(
    model: str, data: Path, rows: list[Row], output: Path, steps: int, dtype: torch.dtype, device: torch.device
) -> Results:
    started = time.monotonic()
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    held_out, training = ([rows[i] for i in part] for part in (order[:HELD_OUT], order[HELD_OUT:]))
    network, tokenizer = load_model_and_tokenizer(model, dtype)
    network.to(device)
    settings = Settings(
        batch_size=ROWS_PER_STEP, max_steps=steps, warmup_epochs=0.1 * steps * ROWS_PER_STEP / len(training),
        base_learning_rate=LEARNING_RATE * SCHEDULED_BATCH_SIZE / ROWS_PER_STEP, max_length=MAX_LENGTH,
    )  # fmt: skip
    execution = Execution(log_steps=1, save_steps=10**6, tensorboard=False, device=str(device))
    examples, unseen = (tokenize(part, tokenizer, MAX_LENGTH) for part in (training, held_out))
    prepare_output(output, {"model": model, "settings": {}}, resume=False)
    loss = _Loss(unseen, device)

    _heading("Before: the model, frozen")
    shown, loss_before = _shown(held_out), loss(network)
    before = _answers(network, tokenizer, shown)
    typer.echo(f"held-out loss {loss_before:.3f}")

    _heading("Training: prompts and gates only")
    measured = _Measured(loss, steps)
    adapter = attach(network, settings)
    outcome = train(network, adapter, examples, output, settings, execution, callbacks=[measured])

    _heading("After")
    loss_after, after = loss(network), _answers(network, tokenizer, shown)
    typer.echo(f"held-out loss {loss_before:.3f} -> {loss_after:.3f}")
    results = Results(
        model=Path(model).name, data=data.name, rows=len(training), outcome=outcome,
        held_out_losses={0: loss_before, **measured.losses, outcome.step: loss_after},
        gates={layer: gate.tolist() for layer, gate in adapter.gates().items()},
        answers=[Answers(r.instruction, r.output, b, a) for r, b, a in zip(shown, before, after, strict=True)],
        device=str(device), dtype=str(dtype).removeprefix("torch."), seconds=time.monotonic() - started,
    )  # fmt: skip
    loss_picture(output / "loss.png", outcome.losses, results.held_out_losses, "held-out rows")
    gates_picture(output / "gates.png", list(results.gates.values()), list(results.gates))
    text = report(results)
    (output / "report.md").write_text(text)
    typer.echo("\n" + text)
    typer.echo(f"Saved: {output}/report.md, loss.png, gates.png and the adapter. Try it yourself:")
    typer.echo(f'  llama-adapter generate --model {model} --adapter {output} --instruction "{shown[0].instruction}"')
    return results


def report(results: Results) -> str:
    """The report; it refers to loss.png and gates.png beside it."""
    outcome, losses = results.outcome, results.held_out_losses
    base = outcome.total_parameters - outcome.trainable_parameters
    gates = [abs(gate) for layer in results.gates.values() for gate in layer]
    lines = [
        f"# {results.model} learns from {results.data}",
        "",
        f"The model's {base:,} parameters stay frozen. Trained are **{outcome.trainable_parameters:,} parameters** "
        f"({outcome.trainable_parameters / base:.2%}): prompts and one gate per head and layer.",
        "",
        f"- {outcome.step} steps of {ROWS_PER_STEP} rows in {outcome.seconds:.0f} s on {results.device} in {results.dtype} "
        f"({torch.get_num_threads()} threads); the whole demo took {results.seconds:.0f} s",
        f"- {results.rows:,} rows to learn from, {HELD_OUT} held out",
        f"- held-out loss (nats per response token): **{losses[min(losses)]:.3f} before, {losses[max(losses)]:.3f} after**",
        f"- gates: 0 before, up to {max(gates):.2f} after (mean of the absolute values {sum(gates) / len(gates):.2f})",
        "",
        "![loss](loss.png)",
        "",
        "![gates](gates.png)",
        "",
        "## Answers to held-out instructions",
        "",
    ]
    for answers in results.answers:
        lines += [
            f"**{in_code(answers.signature)}**",
            "",
            f"- before: {in_code(answers.before)}",
            f"- after: {in_code(answers.after)}",
            f"- the data's own answer: {in_code(answers.docstring)}",
            "",
        ]
    return "\n".join(lines)


def _shown(rows: list[Row]) -> list[Row]:
    """Short instructions come first."""
    return sorted(rows, key=lambda row: len(row.instruction) + len(row.input))[:SHOWN]


def _answers(model: Any, tokenizer: Any, rows: list[Row]) -> list[str]:
    answerer = Answerer(model, tokenizer)
    return [answerer.answer([row], GREEDY)[0] for row in track(rows, "answering")]


def _heading(text: str) -> None:
    typer.secho(f"\n{text}", bold=True)
