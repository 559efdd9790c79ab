"""Adapters that PEFT saved for this package's method: a folder with adapter_config.json and PEFT's file of weights.

The configuration says what the adapter looks like (lak.ZeroGateConfig), the keys say in which layers it is.
"""

import re
from typing import Any

from llama_adapter_kernels.adapters.config import AdapterConfig
from llama_adapter_kernels.adapters.state import AdapterState
from llama_adapter_kernels.formats.files import clip
from llama_adapter_kernels.formats.reading import Choices, Reading, Source, expect_names, load_floating, unknown_note

METHOD = "ZERO_GATE"
_KEY = re.compile(r"base_model\.model\.(?:.+\.)?(\d+)\.(?:[A-Za-z_.]+\.)?zero_gate\.(prompt|gate)")
_TUNED = re.compile(r".*\.zero_gate_tuning\.\w+|.*\.zero_gate\.new_gate")
_FIELDS = ("prefix_length", "num_layers", "layers", "gate", "gate_shape")


def matches(source: Source) -> bool:
    """These are keys of this format."""
    return any(_KEY.fullmatch(name) or _TUNED.fullmatch(name) for name in source.shapes)


def read(source: Source, choices: Choices) -> Reading:
    """The adapter of such a folder.

    Raises:
        ValueError: the configuration is missing or that of another method, keys are missing, or the adapter tunes the model,
            whose modules the file names as PEFT sees them.
    """
    told = source.facts.get("adapter_config")
    if told is None or told.get("peft_type") != METHOD:
        got = "none" if told is None else clip(repr(told.get("peft_type")))
        raise ValueError(f"{source.path}: peft_type in adapter_config.json: expected {METHOD}, got {got}")
    if told.get("tuning") is not None or any(_TUNED.fullmatch(name) for name in source.shapes):
        raise ValueError(
            f"{source.path}: it tunes the model, and PEFT's names tell nothing about where: open it by "
            "PeftModel.from_pretrained; lak.attached_adapters(model)[name].save_pretrained(folder) writes it again"
        )
    config = _config(source, told)
    if choices.gate not in (None, config.gate):
        raise ValueError(f"gate: {source.path} says {config.gate}, got {choices.gate}")
    found: dict[str, dict[int, str]] = {"prompt": {}, "gate": {}}
    for name in source.shapes:
        if match := _KEY.fullmatch(name):
            found[match[2]][int(match[1])] = name
    layers = sorted(found["prompt"].keys() | found["gate"].keys())
    expect_names(source, [f"{n}...zero_gate.{what}" for what in found for n in layers if n not in found[what]])
    loaded, notes = load_floating(source, [name for names in found.values() for name in names.values()])
    tensors = {f"layers.{n}.{what}": loaded[name].clone() for what, names in found.items() for n, name in names.items()}
    unknown = [name for name in source.shapes if not _KEY.fullmatch(name)]
    base: dict[str, Any] = {"hidden_size": source.shapes[found["prompt"][layers[0]]][-1]}
    if config.layers is None:  # the last layer is among them
        base["num_hidden_layers"] = layers[-1] + 1
    return Reading(AdapterState(config, base, tensors, source.load(unknown)), (*notes, *unknown_note(unknown)))


def _config(source: Source, told: Any) -> AdapterConfig:
    try:
        return AdapterConfig(**{name: told[name] for name in _FIELDS})
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{source.path}: expected the fields of a ZeroGateConfig in adapter_config.json ({clip(error)})"
        ) from error
