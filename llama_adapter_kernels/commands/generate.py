"""`llama-adapter generate`."""

import io
import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llama_adapter_kernels.commands import answering
from llama_adapter_kernels.errors import UserError, text_problem

if TYPE_CHECKING:
    from llama_adapter_kernels.generate import Answerer, Sampling
    from llama_adapter_kernels.training.data import Row

Option = typer.Option


def generate(
    model: answering.Model,
    adapter: Annotated[Path | None, Option(help="Folder of a saved adapter; without: the base model answers.")] = None,
    instruction: Annotated[str | None, Option(help="One instruction. Without it and --file: interactive.")] = None,
    input: Annotated[str, Option(help="Further context for --instruction.")] = "",
    image: Annotated[Path | None, Option(help="A picture that --instruction is about.")] = None,
    audio: Annotated[Path | None, Option(help="A sound that --instruction is about.")] = None,
    file: Annotated[Path | None, Option(help="Many: Alpaca JSON or JSONL, or .txt with one a line.")] = None,
    output: Annotated[Path | None, Option(help="JSONL file for the answers to --file (default: print them).")] = None,
    batch_size: Annotated[int, Option(help="Instructions answered at a time, with --file.")] = 8,
    max_new_tokens: answering.MaxNewTokens = 256,
    temperature: answering.Temperature = 0.0,
    top_p: answering.TopP = 1.0,
    template: answering.Template = "auto",
    seed: answering.Seed = 0,
    dtype: answering.Dtype = "auto",
    device: answering.Device = "auto",
    cpu: answering.Cpu = False,
) -> None:
    """Answer an instruction, a file of them, or whatever you type.

    A row of --file that cannot be answered gets an "error" in place of its output, and the exit status is 1.
    """
    _check(instruction, input, file, output, batch_size, seed, template)
    _check_media(instruction, adapter, image, audio)
    import torch

    from llama_adapter_kernels.devices import chosen_device
    from llama_adapter_kernels.generate import Sampling, load_answerer, read_instructions
    from llama_adapter_kernels.models import pick_dtype
    from llama_adapter_kernels.training.data import Row

    sampling = Sampling(max_new_tokens, temperature, top_p)
    place = chosen_device(device, cpu)
    torch_dtype = pick_dtype(dtype, on_cpu=place.type == "cpu", training=False)
    rows = read_instructions(file) if file is not None else []
    answerer = load_answerer(model, adapter, torch_dtype, str(place), template)
    torch.manual_seed(seed)
    if file is not None:
        _answer_file(answerer, rows, sampling, batch_size, file, output)
    elif instruction is not None:
        answerer.answer([Row(instruction, input, "", image, audio)], sampling, stream=_write)
    else:
        _converse(answerer, sampling)


def _check(
    instruction: str | None, context: str, file: Path | None, output: Path | None, batch_size: int, seed: int,
    template: str,
) -> None:  # fmt: skip
    """What can be known to be wrong before anything is imported or loaded."""
    if instruction is not None and file is not None:
        raise UserError("--instruction and --file: expected one of them, got both")
    for name, text in (("instruction", instruction), ("input", context)):
        problem = text_problem(text or "")
        if problem is not None:
            raise UserError(f"--{name}: {problem}")
    if instruction is not None and not instruction.strip():
        raise UserError("--instruction: expected text, got none")
    if context and instruction is None:
        raise UserError("--input: belongs to an --instruction, got none")
    if output is not None:
        if file is None:
            raise UserError("--output: belongs to a --file, got none")
        if output.is_dir():
            raise UserError(f"--output {output}: expected a file, it is a folder")
        if not output.absolute().parent.is_dir():
            raise UserError(f"--output {output}: its folder does not exist")
    answering.check(template, seed)
    if batch_size < 1:
        raise UserError(f"--batch-size: expected at least 1, got {batch_size}")


def _check_media(instruction: str | None, adapter: Path | None, image: Path | None, audio: Path | None) -> None:
    if image is not None and audio is not None:
        raise UserError("--image, --audio: expected one of them, got both")
    for name, path in (("image", image), ("audio", audio)):
        if path is None:
            continue
        if instruction is None or adapter is None:
            raise UserError(f"--{name}: belongs to an --instruction and an --adapter that was trained with {name}s")
        if not path.is_file():
            raise UserError(f"--{name} {path}: no such file")


def _answer_file(
    answerer: "Answerer", rows: "list[Row]", sampling: "Sampling", batch_size: int, file: Path, output: Path | None
) -> None:
    """Prints or writes every answer as soon as it and those before it are there."""
    failed = 0
    try:
        with output.open("w", encoding="utf-8") if output is not None else nullcontext(sys.stdout) as stream:
            for number, answer in answerer.answer_all(rows, sampling, batch_size):
                row = {"instruction": rows[number].instruction, "input": rows[number].input}
                if isinstance(answer, UserError):
                    failed += 1
                    typer.echo(f"error: {file}, row {number + 1}: {answer}", err=True)
                    row["error"] = str(answer)
                else:
                    row["output"] = answer
                stream.write(json.dumps(row, ensure_ascii=False) + "\n")
                stream.flush()
    except OSError as error:
        if output is None:  # a closed pipe
            raise
        raise UserError(f"--output {output}: {error.strerror}") from None
    if failed:
        raise typer.Exit(1)


def _converse(answerer: "Answerer", sampling: "Sampling") -> None:
    """Answers line by line until the input ends. Each instruction stands alone: the adapter was trained like that."""
    from llama_adapter_kernels.training.data import Row

    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # what is no text is then said below, not raised
    if sys.stdin.isatty():
        typer.echo("Type an instruction; Ctrl-D ends.")
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if line:
            try:
                problem = text_problem(line)
                if problem is not None:
                    raise UserError(problem)
                answerer.answer([Row(line)], sampling, stream=_write)
            except UserError as error:  # too long, or no text: the next one may be better
                typer.echo(f"error: {error}", err=True)


def _write(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()
