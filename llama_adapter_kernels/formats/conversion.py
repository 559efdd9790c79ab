"""From one adapter format to another, with what a base model's configuration tells."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from llama_adapter_kernels.adapters.state import AdapterState
from llama_adapter_kernels.formats import native
from llama_adapter_kernels.formats.checking import check_state
from llama_adapter_kernels.formats.files import clip, new_folder, read_json
from llama_adapter_kernels.formats.reading import Choices
from llama_adapter_kernels.formats.registry import WRITERS, read_adapter

TARGETS = ("native", *WRITERS)


def convert(source: Path, target: Path, read_as: str, write_as: str, choices: Choices) -> tuple[str, ...]:
    """Reads an adapter and writes it as another format's new file or folder.

    Args:
        read_as: see registry.read_adapter.
        write_as: one of TARGETS.
        choices: what the source does not say; its base model's facts must not differ from the source's.

    Returns:
        Notes on what was decided and what is other than before.

    Raises:
        OSError: something cannot be read or written, or there is something at `target` already.
        ValueError: the source is no such adapter, does not fit the base model, or cannot be written so.
    """
    reading = read_adapter(source, read_as, choices)
    state = replace(reading.state, base=_merged(source, reading.state, choices.base))
    check_state(state, str(source))
    if write_as == "native":
        with new_folder(target) as folder:
            native.write(folder, state)
        return reading.notes
    notes = WRITERS[write_as](target, state)
    if state.leftover:
        notes += (f"not written, {write_as} has no place for them: {', '.join(map(clip, sorted(state.leftover)))}",)
    return (*reading.notes, *notes)


def base_facts(path: Path) -> dict[str, Any]:
    """Facts of a base model from the config.json in a Hugging Face folder, by AdapterState's names.

    Raises:
        OSError: there is no such file.
        ValueError: it does not tell the sizes.
    """
    told = read_json(path / "config.json")

    def number(name: str, default: int | None = None) -> int:
        value = told.get(name)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 1 << 24:
            raise ValueError(f"{path}/config.json: {name}: expected a whole number from 1, got {clip(repr(value))}")
        return value

    width, heads = number("hidden_size"), number("num_attention_heads")
    kind = {"model_type": told["model_type"]} if isinstance(told.get("model_type"), str) else {}
    return kind | {
        "hidden_size": width, "num_attention_heads": heads,
        "num_hidden_layers": number("num_hidden_layers"), "num_key_value_heads": number("num_key_value_heads", heads),
        "head_dim": number("head_dim", max(width // heads, 1)),
    }  # fmt: skip


def _merged(source: Path, state: AdapterState, base: Mapping[str, Any]) -> dict[str, Any]:
    different = [name for name in base if name in state.base and state.base[name] != base[name]]
    if different:
        theirs = ", ".join(f"{name} {clip(state.base[name])}" for name in different)
        ours = ", ".join(f"{name} {clip(base[name])}" for name in different)
        raise ValueError(f"{source}: the adapter was made for a model with {theirs}; the base model has {ours}")
    return {**state.base, **base}
