"""`llama-adapter demo-real`."""

from pathlib import Path
from typing import Annotated

from typer import Option


def demo_real(
    model: Annotated[str, Option(help="Folder or hub name of a causal language model, such as SmolLM2-135M-Instruct.")],
    data: Annotated[Path, Option(help='Instruction rows: JSON or JSONL with "instruction" and "output".')],
    output: Annotated[Path, Option(help="Folder for pictures, report and adapter.")] = Path("demo-real-output"),
    steps: Annotated[int, Option(help="Optimizer steps, of 8 rows each.")] = 40,
    dtype: Annotated[str, Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, Option(help="auto, cpu, cuda or another device of torch.")] = "auto",
) -> None:
    """Fine-tune an adapter on a real model and real instructions, in minutes; show loss and answers before and after."""
    from llama_adapter_kernels.demo.real import run

    run(model, data, output, steps=steps, dtype=dtype, device=device)
