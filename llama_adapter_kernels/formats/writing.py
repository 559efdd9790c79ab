"""What writers of foreign formats share: which layers they can name, and gates where a format has raw ones only."""

from pathlib import Path

import torch
from torch import Tensor

from llama_adapter_kernels.adapters.state import AdapterState
from llama_adapter_kernels.formats.files import written_whole


def refuse_tuning(state: AdapterState, format_name: str) -> None:
    """The format has prompts and gates only.

    Raises:
        ValueError: the adapter has more.
    """
    if state.config.tuning is not None:
        raise ValueError(f"tuning: {format_name} has prompts and gates only, this adapter tunes the model besides")
    if state.config.prefix_rows != "own":
        raise ValueError(
            f"prefix_rows: {format_name} takes a prompt's keys and values from their own projections, got "
            f"{state.config.prefix_rows}"
        )


def last_layers(state: AdapterState, format_name: str) -> tuple[int, ...]:
    """The adapted layers, which the format can only have at the end of the model.

    Raises:
        ValueError: the base model's number of layers is not known, or there are gaps.
    """
    total = state.base.get("num_hidden_layers")
    if total is None:
        raise ValueError(f"{format_name}: expected to know the base model's number of layers; name the base model")
    layers = state.config.layer_numbers(total)
    if layers != tuple(range(total - len(layers), total)):
        raise ValueError(f"layers: {format_name} has prompts in the last layers only, got {list(layers)} of {total}")
    return layers


def effective_gates(state: AdapterState) -> tuple[dict[int, Tensor], tuple[str, ...]]:
    """What multiplies the prefix branch, by layer: for formats whose gates are raw. The result is the same to the bit."""
    total = state.base["num_hidden_layers"]
    gates = {layer: state.tensors[f"layers.{layer}.gate"] for layer in state.config.layer_numbers(total)}
    if state.config.gate == "identity":
        return gates, ()
    return {n: torch.tanh(gate) for n, gate in gates.items()}, (
        "gates: tanh of them was written, the format's are raw",
    )


def save_new(path: Path, content: object) -> None:
    """torch.save into a new file, whole or not at all.

    Raises:
        FileExistsError: there is something at `path` already.
        OSError: it cannot be written.
    """
    if path.exists():
        raise FileExistsError(f"{path}: expected a new file, there is something already")
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as aside, open(aside, "wb") as file:  # a stream: its bytes do not depend on the name
        torch.save(content, file)
