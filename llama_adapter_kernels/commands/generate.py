"""`llama-adapter generate`."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llama_adapter_kernels.errors import UserError

if TYPE_CHECKING:
    from llama_adapter_kernels.generate import Answerer, Sampling

Option = typer.Option


def generate(
    model: Annotated[str, Option(help="Base model: a local Hugging Face folder or a hub name.")],
    adapter: Annotated[Path | None, Option(help="Folder of a saved adapter; without: the base model answers.")] = None,
    instruction: Annotated[str | None, Option(help="One instruction. Without it and --file: interactive.")] = None,
    input: Annotated[str, Option(help="Further context for --instruction.")] = "",
    file: Annotated[Path | None, Option(help="Many: Alpaca JSON or JSONL, or .txt with one a line.")] = None,
    output: Annotated[Path | None, Option(help="JSONL file for the answers to --file.  [default: print them]")] = None,
    batch_size: Annotated[int, Option(help="Instructions answered at a time, with --file.")] = 8,
    max_new_tokens: Annotated[int, Option(help="Tokens of an answer at most.")] = 256,
    temperature: Annotated[float, Option(help="0: greedy.")] = 0.0,
    top_p: Annotated[float, Option(help="Sample from the most probable tokens of this mass.")] = 1.0,
    seed: Annotated[int, Option(help="Of the sampling.")] = 0,
    dtype: Annotated[str, Option(help="auto, float32, bfloat16 or float16, of the base model.")] = "auto",
    cpu: Annotated[bool, Option("--cpu", help="Use no GPU.")] = False,
) -> None:
    """Answer an instruction, a file of them, or whatever you type."""
    if instruction is not None and file is not None:
        raise UserError("--instruction and --file: expected one of them, got both")
    if instruction is not None and not instruction.strip():
        raise UserError("--instruction: expected text, got none")
    if batch_size < 1:
        raise UserError(f"--batch-size: expected at least 1, got {batch_size}")
    import torch

    from llama_adapter_kernels.generate import Sampling, load_answerer, read_instructions
    from llama_adapter_kernels.models import pick_dtype
    from llama_adapter_kernels.training.data import Row

    sampling = Sampling(max_new_tokens, temperature, top_p)
    rows = read_instructions(file) if file is not None else []
    on_cpu = cpu or not torch.cuda.is_available()
    answerer = load_answerer(
        model, adapter, pick_dtype(dtype, on_cpu=on_cpu, training=False), "cpu" if on_cpu else "cuda"
    )
    torch.manual_seed(seed)
    if file is not None:
        answers = dict(answerer.answer_all(rows, sampling, batch_size))
        lines = [
            json.dumps({"instruction": row.instruction, "input": row.input, "output": answers[i]}, ensure_ascii=False)
            for i, row in enumerate(rows)
        ]
        if output is None:
            typer.echo("\n".join(lines))
            return
        try:
            output.write_text("\n".join(lines) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"--output {output}: {error.strerror}") from None
    elif instruction is not None:
        answerer.answer([Row(instruction, input)], sampling, stream=_write)
    else:
        _converse(answerer, sampling)


def _converse(answerer: "Answerer", sampling: "Sampling") -> None:
    """Answers line by line until the input ends. Each instruction stands alone: the adapter was trained like that."""
    from llama_adapter_kernels.training.data import Row

    if sys.stdin.isatty():
        typer.echo("Type an instruction; Ctrl-D ends.")
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if line:
            try:
                answerer.answer([Row(line)], sampling, stream=_write)
            except UserError as error:  # too long: the next one may fit
                typer.echo(f"error: {error}", err=True)


def _write(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()
