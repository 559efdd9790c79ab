"""Options of the commands that ask a model for answers."""

from typing import Annotated

import typer

from llama_adapter_kernels.errors import UserError

Option = typer.Option
TEMPLATES = ("auto", "alpaca", "chat")

Model = Annotated[str, Option(help="Base model: a local Hugging Face folder or a hub name.")]
MaxNewTokens = Annotated[int, Option(help="Tokens of an answer at most.")]
Temperature = Annotated[float, Option(help="0: greedy.")]
TopP = Annotated[float, Option(help="Sample from the most probable tokens of this mass.")]
Template = Annotated[str, Option(help="alpaca, chat (the tokenizer's), or auto: the adapter's own.")]
Seed = Annotated[int, Option(help="Of the sampling.")]
Dtype = Annotated[str, Option(help="auto, float32, bfloat16 or float16, of the base model.")]
Device = Annotated[str, Option(help="cpu, cuda, cuda:N, mps or another; auto: a GPU where there is one.")]
Cpu = Annotated[bool, Option("--cpu", help="Short for --device cpu.")]


def check(template: str, seed: int) -> None:
    """
    Raises:
        UserError: an unknown template, or a seed that torch does not take.
    """
    if template not in TEMPLATES:
        raise UserError(f"--template: expected auto, alpaca or chat, got {template!r}")
    if not 0 <= seed < 2**63:
        raise UserError(f"--seed: expected a number from 0 to 2**63 - 1, got {seed}")
