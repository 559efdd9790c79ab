"""`llama-adapter convert`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llama_adapter_kernels.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable

Option = typer.Option
_MODELS = ("meta", "gguf")
_DTYPES = ("bfloat16", "float16", "float32")


def convert(
    source: Annotated[Path, typer.Argument(help="An adapter of any project, or a base model (Meta's folder, GGUF).")],
    target: Annotated[Path, typer.Argument(help="New file or folder to write.")],
    read_as: Annotated[str, Option("--from", help="Format of SOURCE; auto: recognised by what is in it.")] = "auto",
    write_as: Annotated[
        str | None,
        Option("--to", help="native, peft, official-v1, litgpt; huggingface for base models (default: native)."),
    ] = None,
    base: Annotated[
        Path | None, Option(help="Folder of the base model, for what an adapter file does not tell.")
    ] = None,
    gate: Annotated[str | None, Option(help="tanh or identity, for official V1 files (default: tanh).")] = None,
    prefix_length: Annotated[int | None, Option(help="Prompts per layer, where the file does not tell.")] = None,
    legacy_rows: Annotated[
        bool | None,
        Option("--legacy-rows/--own-rows", help="A LitGPT file of release 0.5.5 or later, or an earlier one."),
    ] = None,
    max_positions: Annotated[int | None, Option(help="Longest sequence of a model of Meta's.")] = None,
    dtype: Annotated[str, Option(help="bfloat16, float16 or float32, of a model from GGUF.")] = "bfloat16",
) -> None:
    """Convert adapters between projects, and base models of Meta or GGUF to a Hugging Face folder.

    Nothing that an earlier run left is replaced, and an interrupted run leaves nothing.
    """
    from llama_adapter_kernels.formats import gguf, meta_weights
    from llama_adapter_kernels.formats.registry import FORMATS
    from llama_adapter_kernels.models import adapter_error_as_user_error

    formats = ("auto", "native", *FORMATS, *_MODELS)
    if read_as not in formats:
        raise UserError(f"--from: expected one of {', '.join(formats)}; got {read_as!r}")
    if dtype not in _DTYPES:
        raise UserError(f"--dtype: expected one of {', '.join(_DTYPES)}; got {dtype!r}")
    if max_positions is not None and max_positions < 1:
        raise UserError(f"--max-positions: expected at least 1, got {max_positions}")
    if not source.exists():
        raise UserError(f"{source}: no such file or folder")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target}: expected a new file or folder, there is something already")
    with adapter_error_as_user_error():
        if read_as == "meta" or (read_as == "auto" and meta_weights.is_meta_folder(source)):
            _check_target(write_as)
            notes = _with_progress(lambda report: meta_weights.convert(source, target, max_positions, report))
        elif read_as == "gguf" or (read_as == "auto" and gguf.is_gguf(source)):
            import torch

            _check_target(write_as)
            notes = gguf.convert(source, target, getattr(torch, dtype))
        else:
            notes = _convert_adapter(
                source, target, read_as, write_as or "native", base, gate, prefix_length, legacy_rows
            )
    for note in notes:
        typer.echo(note)
    typer.echo(f"Written to {target}")


def _check_target(write_as: str | None) -> None:
    if write_as not in (None, "huggingface"):
        raise UserError(f"--to: a base model is written as huggingface, got {write_as!r}")


def _convert_adapter(
    source: Path,
    target: Path,
    read_as: str,
    write_as: str,
    base: Path | None,
    gate: str | None,
    prefix_length: int | None,
    legacy_rows: bool | None,
) -> tuple[str, ...]:
    from llama_adapter_kernels.formats import conversion
    from llama_adapter_kernels.formats.reading import Choices

    if write_as not in conversion.TARGETS:
        raise UserError(f"--to: expected one of {', '.join(conversion.TARGETS)}; got {write_as!r}")
    facts = conversion.base_facts(base) if base is not None else {}
    choices = Choices(gate, prefix_length, legacy_rows, facts)
    return conversion.convert(source, target, read_as, write_as, choices)


def _with_progress(run: "Callable[[Callable[[int, int, str], None]], tuple[str, ...]]") -> tuple[str, ...]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("")
        return run(lambda done, total, name: progress.update(task, completed=done, total=total, description=name))
