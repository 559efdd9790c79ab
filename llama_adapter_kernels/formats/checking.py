"""What every adapter state must fulfil before anything is built from it or written: its parts fit each other."""

import re
from collections.abc import Mapping
from typing import Any

import torch

from llama_adapter_kernels.adapters.state import AdapterState
from llama_adapter_kernels.adapters.v2 import Tuning
from llama_adapter_kernels.formats.files import clip, listed

_FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_LARGEST = 1 << 24  # of any size in a base model; the hidden size of a 405B Llama is 16384
_TUNED = re.compile(r"tuning\.(?:(?:layers\.\d+\.)?[\w.]+)\.(bias|scale|lora_a|lora_b|weight)")
_NUMBERS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")


def check_state(state: AdapterState, where: str) -> None:
    """The tensors are those that the configuration tells, floating and finite, and fit what is known of the base model.

    Args:
        where: the file, for messages.

    Raises:
        ValueError: they are not; the message gives both sides.
    """
    _check_base(state.base, where)
    for name, tensor in state.tensors.items():
        if tensor.dtype not in _FLOATING:
            raise ValueError(f"{where}: {clip(name)}: expected a floating tensor, got {tensor.dtype}")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{where}: {clip(name)}: expected finite values, got NaN or infinity")
    try:
        shapes = _shapes(state)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    tuned = {name for name in state.tensors if name.startswith("tuning.")}
    different = shapes.keys() ^ (state.tensors.keys() - tuned)
    if different:
        missing, more = sorted(shapes.keys() - state.tensors.keys()), sorted(different - shapes.keys())
        raise ValueError(
            f"{where}: missing tensors: {listed(missing) or 'none'}; unknown tensors: {listed(more) or 'none'}"
        )
    for name, shape in shapes.items():
        if tuple(state.tensors[name].shape) != shape:
            found = list(state.tensors[name].shape)
            raise ValueError(f"{where}: {name}: expected shape {list(shape)}, got {clip(found)}")
    _check_tuned(state, tuned, where)


def _check_base(base: dict[str, Any], where: str) -> None:
    for name in ("hidden_size", "num_hidden_layers"):
        if name not in base:
            raise ValueError(f"{where}: {name} of the base model: expected a number, got none")
    for name in _NUMBERS:
        value = base.get(name, 1)
        if type(value) is not int or not 1 <= value <= _LARGEST:
            raise ValueError(
                f"{where}: {name} of the base model: expected a whole number from 1, got {clip(repr(value))}"
            )
    if not isinstance(base.get("model_type", ""), str):
        raise ValueError(
            f"{where}: model_type of the base model: expected a name, got {clip(repr(base['model_type']))}"
        )


def _shapes(state: AdapterState) -> dict[str, tuple[int, ...]]:
    """Names and shapes that the configuration asks for, the tuned modules' aside."""
    config, base = state.config, state.base
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in config.layer_numbers(base["num_hidden_layers"]):
        gate = state.tensors.get(f"layers.{layer}.gate", torch.empty(1))
        # A file that does not tell the number of heads may have any.
        heads = base.get("num_attention_heads", gate.numel()) if config.gate_shape == "head" else 1
        shapes[f"layers.{layer}.prompt"] = (config.prefix_length, base["hidden_size"])
        shapes[f"layers.{layer}.gate"] = (heads,)
        if config.tuning is not None and config.tuning.new_gate:
            shapes[f"layers.{layer}.new_gate"] = (1,)
    return shapes


def _check_tuned(state: AdapterState, tuned: set[str], where: str) -> None:
    tuning = state.config.tuning
    if tuning is None and tuned:
        raise ValueError(
            f"{where}: expected no tuned tensors as the configuration has no tuning, got {listed(sorted(tuned))}"
        )
    for name in tuned:
        assert tuning is not None
        match = _TUNED.fullmatch(name)
        tensor = state.tensors[name]
        if match is None or not _wanted(tuning, match[1]):
            raise ValueError(f"{where}: {clip(name)}: the configuration's tuning has no such tensor")
        rank = {"lora_a": tensor.shape[0], "lora_b": tensor.shape[-1]}.get(match[1]) if tensor.dim() else None
        if tensor.dim() != (2 if rank is not None else 1) or rank not in (None, tuning.lora_rank):
            expected = "[rank, in]" if match[1] == "lora_a" else "[out, rank]" if match[1] == "lora_b" else "[size]"
            raise ValueError(
                f"{where}: {clip(name)}: expected {expected} with rank {tuning.lora_rank}, got {clip(list(tensor.shape))}"
            )


def check_tuned(state: AdapterState, shapes: Mapping[str, Mapping[str, tuple[int, ...]]], where: str) -> None:
    """The tuned tensors are those of a model.

    Args:
        shapes: of the model's tuned parameters, by the path of their module and by name.

    Raises:
        ValueError: they are not; the message gives both sides.
    """
    expected = {f"tuning.{path}.{name}": shape for path, found in shapes.items() for name, shape in found.items()}
    found = {name for name in state.tensors if name.startswith("tuning.")}
    missing, more = sorted(expected.keys() - found), sorted(found - expected.keys())
    if missing or more:
        raise ValueError(
            f"{where}: does not tune what this model has: missing tensors: {listed(missing) or 'none'}; unknown tensors: "
            f"{listed(more) or 'none'}"
        )
    for name, shape in expected.items():
        if tuple(state.tensors[name].shape) != shape:
            raise ValueError(
                f"{where}: {name}: this model has shape {list(shape)}, got {list(state.tensors[name].shape)}"
            )


def _wanted(tuning: Tuning, kind: str) -> bool:
    wanted = {"bias": bool(tuning.bias) or tuning.norms, "scale": tuning.scale != "none", "weight": tuning.norms}
    return wanted.get(kind, tuning.lora_rank > 0)
