"""The command `llama-adapter`. Each subcommand lives in `commands/`; heavy imports happen inside them."""

import io
import logging
import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from llama_adapter_kernels.commands import (
    bench,
    bench_check,
    bench_report,
    chat,
    convert,
    demo,
    demo_real,
    demo_senses,
    encode,
    evaluate,
    finetune,
    generate,
    info,
    plan,
)
from llama_adapter_kernels.errors import UserError

# Packages that only some commands need -> the extra that brings them.
_EXTRAS = dict.fromkeys(("transformers", "accelerate", "safetensors", "sentencepiece"), "transformers") | {
    "matplotlib": "bench",
    "peft": "peft",
    "yaml": "transformers",
    "huggingface_hub": "transformers",
    "pyarrow": "data",
    "gguf": "gguf",
}


class _Commands(TyperGroup):
    """Prints a user's mistake as one line instead of a stack trace."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            typer.secho(f"error: {error}", err=True, fg=typer.colors.RED)
            raise typer.Exit(2) from error
        except ModuleNotFoundError as error:
            extra = _EXTRAS.get(error.name or "")
            if extra is None:
                raise
            command = f"pip install 'llama-adapter-kernels[{extra}]'"
            typer.secho(f"error: this needs {error.name}, which is not installed: {command}", err=True)
            raise typer.Exit(2) from error
        except KeyboardInterrupt:
            typer.secho("interrupted", err=True)
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=_Commands,
    help="Zero-init attention (LLaMA-Adapter): fine-tune an adapter, generate with it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        from llama_adapter_kernels import __version__

        typer.echo(f"llama-adapter-kernels {__version__}")
        raise typer.Exit


@app.callback()
def main(
    verbose: Annotated[bool, typer.Option("--verbose", help="Say more while working.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(
                errors="backslashreplace"
            )  # an answer that the terminal cannot show must not be an error
    # The other processes of a torchrun would say the same again.
    main_process = os.environ.get("RANK", "0") == "0"
    level = (logging.DEBUG if verbose else logging.INFO) if main_process else logging.ERROR
    package = logging.getLogger("llama_adapter_kernels")
    package.setLevel(level)
    if not package.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        package.addHandler(handler)


app.command()(finetune.finetune)
app.command()(generate.generate)
app.command()(chat.chat)
app.command()(encode.encode)
app.command()(convert.convert)
app.command()(evaluate.evaluate)
app.command()(demo.demo)
app.command()(demo_real.demo_real)
app.command()(demo_senses.demo_image)
app.command()(demo_senses.demo_sound)
app.command()(plan.plan)
app.command()(info.info)
app.command()(bench.bench)
app.command()(bench_report.bench_report)
app.command()(bench_check.bench_check)
