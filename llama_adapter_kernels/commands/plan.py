"""`llama-adapter plan`."""

from typing import Annotated

import typer

from llama_adapter_kernels.errors import UserError

Option = typer.Option
_LAYERS_BELOW = 2  # without prompts, as in the paper
_GOALS = {"llama-7b": (30.0, 18.0)}  # minutes and GB on the default data


def plan(
    model: Annotated[
        str, Option(help="config.json, a folder with one, or llama-7b, llama-13b, llama-3-8b, smollm2-135m.")
    ] = "llama-7b",
    device: Annotated[str, Option(help="h100, h200, a100, rtx4090, or cpu: this one, measured.")] = "h100",
    dtype: Annotated[str, Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    layers: Annotated[int | None, Option(help="Topmost layers with prompts (default: all but the lowest 2).")] = None,
    prefix_length: Annotated[int, Option(help="Prompt tokens per layer.")] = 10,
    epochs: Annotated[float, Option(help="Passes over the data.")] = 5.0,
    tokens: Annotated[float | None, Option(help="Of an epoch (default: Alpaca's 6.65 million).")] = None,
    responses: Annotated[float, Option(help="Part of the tokens that is predicted.")] = 0.5,
    micro_batch: Annotated[
        int | None, Option(help="Tokens at a time (default: the fastest that fits).", metavar="TOKENS")
    ] = None,
    fused: Annotated[
        bool | None, Option("--fused/--separate", help="Kernels of norms, rotations, activations (default: separate).")
    ] = None,
    memory: Annotated[str, Option(help="auto, low (activations computed again) or high (kept).")] = "auto",
    minutes: Annotated[float | None, Option(help="Say whether the run is done in so many.")] = None,
    gigabytes: Annotated[float | None, Option(help="And whether it gets by with so much memory.")] = None,
) -> None:
    """Say what fine-tuning will cost: operations, bytes, memory by part, and time by term with what limits it.

    Nothing is run and nothing downloaded. Lengths of sequences are Alpaca's.
    """
    from llama_adapter_kernels.planning.shapes import read_shape

    shape = read_shape(model)
    _check(dtype, memory, {"--prefix-length": prefix_length, "--epochs": epochs, "--tokens": tokens,
                           "--micro-batch": micro_batch, "--minutes": minutes, "--gigabytes": gigabytes})  # fmt: skip
    if not 0 < responses <= 1:
        raise UserError(f"--responses: expected more than 0 and at most 1, got {responses}")
    adapted = max(1, shape.layers - _LAYERS_BELOW) if layers is None else layers
    if not 1 <= adapted <= shape.layers:
        raise UserError(f"--layers: expected 1 to {shape.layers}, the model's, got {layers}")
    from rich.console import Console

    from llama_adapter_kernels.bench.lengths import EXAMPLES, alpaca_lengths
    from llama_adapter_kernels.planning.devices import find_device
    from llama_adapter_kernels.planning.estimate import Data, choices, estimate, fastest
    from llama_adapter_kernels.planning.operations import Adapter, Batch
    from llama_adapter_kernels.planning.report import Goal, report

    found = find_device(device, dtype)
    alpaca = Batch.packed(alpaca_lengths(EXAMPLES), 0)
    data = Data(alpaca.tokens if tokens is None else tokens, epochs, alpaca.pairs / alpaca.tokens, responses)
    adapter = Adapter(adapted, prefix_length)
    low = {"auto": None, "low": True, "high": False}[memory]
    tried = [estimate(shape, adapter, data, found, dtype, choice) for choice in choices(fused, low, micro_batch)]
    eager = [one for one in tried if one.choice.fused == bool(fused)]
    chosen = fastest(eager, found.memory) or min(eager, key=lambda one: one.bytes)
    goals = _GOALS.get(model) if tokens is None else None
    goal = None
    if minutes is not None or gigabytes is not None or goals is not None:
        default = goals or (float("inf"), float("inf"))
        goal = Goal(60 * (minutes or default[0]), 1e9 * (gigabytes or default[1]))
    Console(soft_wrap=True).print(report(shape, adapter, data, found, chosen, tried, goal))


def _check(dtype: str, memory: str, counts: dict[str, float | None]) -> None:
    for name, value, known in (
        ("--dtype", dtype, ("bfloat16", "float16", "float32")),
        ("--memory", memory, ("auto", "low", "high")),
    ):
        if value not in known:
            raise UserError(f"{name}: expected {', '.join(known)}, got {value!r}")
    for name, count in counts.items():
        if count is not None and not 0 < count < 1e15:  # NaN compares false
            raise UserError(f"{name}: expected more than 0, got {count}")
