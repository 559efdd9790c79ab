"""`llama-adapter chat`."""

import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llama_adapter_kernels.commands import answering
from llama_adapter_kernels.errors import UserError, text_problem

if TYPE_CHECKING:
    from llama_adapter_kernels.chat import Conversation

Option = typer.Option
COMMANDS = """\
/adapter NAME or FOLDER   another adapter answers from now on; none: the base model; alone: which there are
/reset                    begin again
/quit                     end, as Ctrl-D does"""


def chat(
    model: answering.Model,
    adapter: Annotated[
        list[Path] | None,
        Option(help="Folder of a saved adapter, or its hub name; may be repeated, the first one answers first."),
    ] = None,
    system: Annotated[str | None, Option(help="What the conversation begins with.")] = None,
    max_new_tokens: answering.MaxNewTokens = 512,
    temperature: answering.Temperature = 0.0,
    top_p: answering.TopP = 1.0,
    template: answering.Template = "auto",
    seed: answering.Seed = 0,
    dtype: answering.Dtype = "auto",
    device: answering.Device = "auto",
    cpu: answering.Cpu = False,
) -> None:
    """Talk with a model over several turns, with adapters that can be exchanged meanwhile (/adapter; /help says more).

    Lines may come through a pipe: answers go to the standard output, everything else to the standard error.
    """
    answering.check(template, seed)
    problem = text_problem(system or "")
    if problem is not None:
        raise UserError(f"--system: {problem}")
    import torch

    from llama_adapter_kernels.chat import BASE, Conversation
    from llama_adapter_kernels.devices import chosen_device
    from llama_adapter_kernels.generate import Sampling, load_answerer
    from llama_adapter_kernels.models import pick_dtype

    sampling, place = Sampling(max_new_tokens, temperature, top_p), chosen_device(device, cpu)
    torch_dtype = pick_dtype(dtype, on_cpu=place.type == "cpu", training=False)
    talk = Conversation(load_answerer(model, None, torch_dtype, str(place), template), sampling, template, system)
    names = [talk.use(str(folder)) for folder in adapter or ()]
    talk.use(names[0] if names else BASE)
    torch.manual_seed(seed)
    if _converse(talk) and not sys.stdin.isatty():
        raise typer.Exit(1)


def _converse(talk: "Conversation") -> bool:
    """Reads lines until they end or /quit. Returns whether any of them went wrong."""
    terminal, failed = sys.stdin.isatty(), False
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # what is no text is then said, not raised
    if terminal:
        _note("Say something; /help lists commands, Ctrl-D ends.")
    while True:
        try:
            line = input("> " if terminal else "").strip()
        except EOFError:
            return failed
        if line == "/quit":
            return failed
        if not line:
            continue
        try:
            if line.startswith("/"):
                _command(talk, line)
                continue
            left_out = talk.say(line, _write)
            if left_out:
                _note(f"(the model's context had no room for the {left_out} oldest of the exchanges)")
        except UserError as error:
            failed = True
            _note(f"error: {error}")
        except KeyboardInterrupt:
            if not terminal:
                raise
            _note("\n(interrupted; the answer is forgotten)")


def _command(talk: "Conversation", line: str) -> None:
    """Raises UserError for a command that there is not."""
    word, _, rest = line.partition(" ")
    if word == "/help":
        _note(COMMANDS)
    elif word == "/reset":
        talk.reset()
        _note("(forgotten)")
    elif word == "/adapter" and not rest.strip():
        _note(f"adapters: {', '.join([*talk.adapters, 'none'])}; {talk.active or 'none'} answers")
    elif word == "/adapter":
        _note(f"({talk.use(rest.strip())} answers from now on)")
    else:
        raise UserError(f"{word}: expected one of /adapter, /reset, /quit and /help")


def _note(text: str) -> None:
    typer.echo(text, err=True)


def _write(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()
