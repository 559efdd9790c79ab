"""The demo from beginning to end: a frozen model that knows docstrings learns to answer instructions."""

import json
import time
from pathlib import Path
from typing import Any

import torch
import transformers
import typer
from transformers import TrainerCallback

from llama_adapter_kernels.demo import corpus
from llama_adapter_kernels.demo.measure import held_out_loss, step_times
from llama_adapter_kernels.demo.pictures import gates_picture, loss_picture
from llama_adapter_kernels.demo.report import Answers, Results, report
from llama_adapter_kernels.generate import Answerer, Sampling
from llama_adapter_kernels.models import load_model_and_tokenizer
from llama_adapter_kernels.ops import backends
from llama_adapter_kernels.training.data import Row
from llama_adapter_kernels.training.loop import train
from llama_adapter_kernels.training.preparation import attach
from llama_adapter_kernels.training.run_folder import RUN_FILE, check_output, claim, prepare_output
from llama_adapter_kernels.training.settings import DEFAULT_MAX_LENGTH, Execution, Settings
from llama_adapter_kernels.training.tokens import Example, tokenize

BASE_MODEL = Path(__file__).parent / "assets" / "base"
SETTINGS = Settings(
    layers=5, epochs=2, max_steps=200, warmup_epochs=0.2, batch_size=32, base_learning_rate=0.16, max_length=256
)
EXECUTION = Execution(micro_batch_size=16, log_steps=2, tensorboard=False, on_cpu=True)
EVALUATIONS = 4  # of the held-out loss while training
# Held-out functions that are in every supported Python; shown before and after.
SHOWN = ("threading.Condition.notify_all", "pathlib.Path.is_socket", "ftplib.FTP.voidcmd")
GREEDY = Sampling(max_new_tokens=40)


class HeldOutLoss(TrainerCallback):
    """Measures the held-out loss a few times during training."""

    def __init__(self, examples: list[Example], steps: int) -> None:
        self.examples = examples
        self.every = max(1, steps // EVALUATIONS)
        self.losses: dict[int, float] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step % self.every == 0 and state.global_step < state.max_steps:
            self.losses[state.global_step] = held_out_loss(model, self.examples)


def run(output: Path, settings: Settings = SETTINGS, held_out_limit: int | None = None) -> Results:
    """Runs the demo on the CPU; writes loss.png, gates.png, report.md and the adapter into `output`.

    Args:
        held_out_limit: evaluate on so many of the held-out functions; None: on all.

    Raises:
        UserError: `output` holds something else than an earlier demo.
    """
    transformers.utils.logging.disable_progress_bar()  # of the loading; training shows its own
    again = (output / RUN_FILE).exists()
    check_output(output, resume=False, overwrite=again)
    with claim(output):
        return _run(output, settings, held_out_limit)


def _run(output: Path, settings: Settings, held_out_limit: int | None) -> Results:
    started = time.monotonic()
    _heading("Text: the docstrings of this Python's standard library")
    training, held_out = corpus.examples(corpus.standard_library())
    shown, held_out = _shown(held_out), held_out[:held_out_limit]
    typer.echo(f"{len(training)} functions to learn from, {len(held_out)} held out (the base model has not seen them)")
    network, tokenizer = load_model_and_tokenizer(str(BASE_MODEL), torch.float32)
    examples, unseen = (
        tokenize([Row(**example.row()) for example in side], tokenizer, settings.max_length or DEFAULT_MAX_LENGTH)
        for side in (training, held_out)
    )
    prepare_output(output, {"model": "demo", "settings": {}}, resume=False)

    _heading("Before: the base model, frozen")
    answerer = Answerer(network, tokenizer)
    rows = [Row(corpus.INSTRUCTION, example.signature) for example in shown]
    before, loss_before = answerer.answer(rows, GREEDY), held_out_loss(network, unseen)
    typer.echo(f"held-out loss {loss_before:.3f}")

    _heading("Training: prompts and gates only")
    steps = settings.max_steps or settings.epochs * -(-len(examples) // settings.batch_size)
    measured = HeldOutLoss(unseen, steps)
    adapter = attach(network, settings)
    outcome = train(network, adapter, examples, output, settings, EXECUTION, callbacks=[measured])

    _heading("After")
    after, loss_after = answerer.answer(rows, GREEDY), held_out_loss(network, unseen)
    typer.echo(f"held-out loss {loss_before:.3f} -> {loss_after:.3f}")
    results = Results(
        outcome=outcome,
        training_functions=len(training),
        held_out_functions=len(held_out),
        held_out_losses={0: loss_before, **measured.losses, outcome.step: loss_after},
        gates={layer: gate.tolist() for layer, gate in adapter.gates().items()},
        answers=[Answers(e.signature, e.answer, b, a) for e, b, a in zip(shown, before, after, strict=True)],
        step_seconds=step_times(network),
        backend=backends.choose(None, torch.empty(1, 1, 1, 32)),
        threads=torch.get_num_threads(),
        base_model=json.loads((BASE_MODEL / "provenance.json").read_text()),
        seconds=time.monotonic() - started,
    )
    loss_picture(output / "loss.png", outcome.losses, results.held_out_losses)
    gates_picture(output / "gates.png", list(results.gates.values()), list(results.gates))
    text = report(results)
    (output / "report.md").write_text(text)
    typer.echo("\n" + text)
    typer.echo(f"Saved: {output}/report.md, loss.png, gates.png and the adapter. Try it yourself:")
    typer.echo(f"  llama-adapter generate --model {BASE_MODEL} --adapter {output} \\")
    typer.echo(f'    --instruction "{corpus.INSTRUCTION}" --input "{shown[0].signature}"')
    return results


def _shown(held_out: list[corpus.Example]) -> list[corpus.Example]:
    """The examples to show; others where this Python has not all of them."""
    by_name = {example.name: example for example in held_out}
    chosen = [by_name[name] for name in SHOWN if name in by_name]
    return [*chosen, *(example for example in held_out if example not in chosen)][: len(SHOWN)]


def _heading(text: str) -> None:
    typer.secho(f"\n{text}", bold=True)
