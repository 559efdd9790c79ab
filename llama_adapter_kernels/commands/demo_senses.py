"""`llama-adapter demo-image` and `llama-adapter demo-sound`."""

from pathlib import Path
from typing import Annotated

import typer


def demo_image(
    output: Annotated[Path, typer.Option(help="Folder for pictures, report and adapter.")] = Path("demo-image-output"),
) -> None:
    """Teach a small language model to answer questions about handwritten digits, in minutes."""
    from llama_adapter_kernels.demo.senses.run import run

    run(output, "image")


def demo_sound(
    output: Annotated[Path, typer.Option(help="Folder for sounds, report and adapter.")] = Path("demo-sound-output"),
) -> None:
    """Teach a small language model to answer questions about melodies, in minutes."""
    from llama_adapter_kernels.demo.senses.run import run

    run(output, "audio")
