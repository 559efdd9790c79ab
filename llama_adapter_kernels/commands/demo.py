"""`llama-adapter demo`."""

from pathlib import Path
from typing import Annotated

import typer


def demo(
    output: Annotated[Path, typer.Option(help="Folder for pictures, report and adapter.")] = Path("demo-output"),
) -> None:
    """Fine-tune an adapter on the docstrings of this Python's standard library, in minutes; show what it changes."""
    from llama_adapter_kernels.demo.run import run

    run(output)
