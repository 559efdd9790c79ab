"""Adapters of the official LLaMA-Adapter projects and of those built on them: V1, V2 multimodal, ImageBind-LLM, MU-LLaMA.

All of them have Meta's names (`layers.3.attention.gate`), tanh gates and one table of prompts for the last layers; the
later ones put `llama.` in front, tune biases and norms, add a LoRA that prompts bypass, and add to the prompts what an image
or a sound says. The modules that make that of it are kept under their own names.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from llama_adapter_kernels.adapters.state import AdapterState
from llama_adapter_kernels.formats.files import clip
from llama_adapter_kernels.formats.meta_names import MetaKeys, assemble, sort_keys, tuning_of
from llama_adapter_kernels.formats.reading import (
    Choices,
    Reading,
    Source,
    expect_names,
    load_floating,
    refuse_gate,
    unknown_note,
)
from llama_adapter_kernels.formats.torch_file import Settings
from llama_adapter_kernels.formats.writing import last_layers, refuse_tuning, save_new

_OFFICIAL_LENGTH = 10  # prompts per layer in every official file so far
_VISUAL = re.compile(r"(visual_query|visual_blocks|visual_proj|visual_proj_norm|clip_proj|clip_proj_norm)\..+")
_IMAGE_BIND = re.compile(r"image_bind_(proj|norm_\d|f[123]_\d)\..+")
_MERT = re.compile(r"mu_mert_(?!model).+")
_ENCODER = re.compile(r"(clip|image_bind|mu_mert_model|mert_model)\..+")  # frozen; only in whole checkpoints


def read_v1(source: Source, choices: Choices) -> Reading:
    """LLaMA-Adapter V1: the adapter alone or a whole checkpoint of its trainer. Gates are tanh unless chosen otherwise."""
    keys = sort_keys(source)
    keys.base += keys.norms.values()  # V1 freezes norms: only a whole checkpoint has any
    keys.norms.clear()
    gate = choices.gate or "tanh"
    reason = (
        "as chosen" if choices.gate else "the default; identity is for files meant for the project's raw inference code"
    )
    notes = (f"gate activation: {gate} ({reason})",)
    return _read(source, choices, keys, "adapter_query.weight", None, gate, None, notes)


def read_multimodal(source: Source, choices: Choices) -> Reading:
    """LLaMA-Adapter V2 multimodal, BIAS and LORA files."""
    refuse_gate(choices, "tanh", "official V2")
    keys = sort_keys(source)
    shape = source.shapes[keys.rest["visual_query.weight"]] if "visual_query.weight" in keys.rest else ()
    length = shape[0] if shape else None
    return _read(source, choices, keys, "adapter_query.weight", length, "tanh", _VISUAL)


def read_chat(source: Source, choices: Choices) -> Reading:
    """LLaMA-Adapter V2 chat: a scale of each linear's inputs, a bias behind it, norms; prompts only if there are any."""
    refuse_gate(choices, "tanh", "official V2")
    keys = sort_keys(source)
    if "adapter_query.weight" in keys.rest:
        return _read(source, choices, keys, "adapter_query.weight", None, "tanh", None, prompts_by="tuned")
    total = keys.layers()
    notes = (f"gates of {len(keys.gates)} layers left out: there are no prompts",) if keys.gates else ()
    leftover, left = leftover_of(source, keys, None)
    tuning = tuning_of(source, keys, total, "tuned")
    reading = assemble(source, choices, keys, None, {}, {}, total, "tanh", tuning, leftover)
    return Reading(reading.state, (*notes, *reading.notes, *left))


def read_image_bind(source: Source, choices: Choices) -> Reading:
    """ImageBind-LLM: one prompt for every layer, to which the embedding of any modality is added."""
    refuse_gate(choices, "tanh", "ImageBind-LLM")
    return _read(source, choices, sort_keys(source), "prefix_query.weight", 1, "tanh", _IMAGE_BIND)


def read_mu_llama(source: Source, choices: Choices) -> Reading:
    """MU-LLaMA: one prompt for each of the last 20 layers, to which music is added."""
    refuse_gate(choices, "tanh", "MU-LLaMA")
    return _read(source, choices, sort_keys(source), "prefix_query.weight", 1, "tanh", _MERT)


def _read(
    source: Source,
    choices: Choices,
    keys: MetaKeys,
    prompts: str,
    length: int | None,
    activation: str,
    kept: "re.Pattern[str] | None",
    notes: tuple[str, ...] = (),
    prompts_by: str = "base",
) -> Reading:
    """The adapter of a file with a table of prompts.

    Args:
        prompts: the table's name, without a `llama.` in front.
        length: P where the format fixes it.
        kept: names of parts that belong to the format, but to no adapter.
        prompts_by: see Tuning.prompts.
    """
    expect_names(source, [] if prompts in keys.rest else [prompts])
    total = keys.layers()
    expect_names(
        source, [f"layers.{layer}.attention.gate" for layer in range(max(total, 1)) if layer not in keys.gates]
    )
    gates, rounded = load_floating(source, keys.gates.values())
    by_layer = {layer: gates[name] for layer, name in keys.gates.items()}
    table_name = keys.rest.pop(prompts)
    shape = source.shapes[table_name]
    if len(shape) != 2 or 0 in shape:
        raise ValueError(
            f"{source.path}: {table_name}: expected [layers times prompts, hidden], got {clip(list(shape))}"
        )
    count, how = _adapted_layers(source, choices, shape[0], length, by_layer)
    adapted = range(total - count, total)
    if keys.new_gates:
        missing = [f"layers.{layer}.attention.new_gate" for layer in adapted if layer not in keys.new_gates]
        expect_names(source, missing)
    new_gates, rounded_too = load_floating(source, keys.new_gates.values())
    table, rounded_table = load_floating(source, [table_name])
    leftover, left = leftover_of(source, keys, kept)
    reading = assemble(
        source, choices, keys, table[table_name].view(count, -1, shape[1]), by_layer,
        {layer: new_gates[name] for layer, name in keys.new_gates.items()}, total, activation,
        tuning_of(source, keys, total, prompts_by), leftover,
    )  # fmt: skip
    return Reading(reading.state, (*notes, *how, *rounded, *rounded_too, *rounded_table, *reading.notes, *left))


def _adapted_layers(
    source: Source, choices: Choices, rows: int, length: int | None, gates: Mapping[int, Tensor]
) -> tuple[int, tuple[str, ...]]:
    """How many of the last layers the rows of prompts are for, and how that was found."""
    total = len(gates)
    asked = choices.prefix_length if choices.prefix_length is not None else length
    settings = source.facts.get("args")
    if asked is None and isinstance(settings, Settings) and isinstance(settings.values.get("adapter_len"), int):
        asked = settings.values["adapter_len"]
    if asked is not None:
        if asked < 1 or rows % asked or rows // asked > total:
            raise ValueError(
                f"{source.path}: {rows} rows of prompts: expected {clip(asked)} for each of at most {total} layers"
            )
        return rows // asked, ()
    # Gates of layers without prompts are in the file, too, and never moved from 0.
    first = next((layer for layer in range(total) if gates[layer].any()), total)
    count = total - first
    if count and rows % count == 0:
        return count, (f"{rows // count} prompts for each of the last {count} layers, whose gates are not 0",)
    if rows % _OFFICIAL_LENGTH == 0 and rows // _OFFICIAL_LENGTH <= total and not count:
        return rows // _OFFICIAL_LENGTH, (f"{_OFFICIAL_LENGTH} prompts per layer, as in the official files",)
    raise ValueError(
        f"{source.path}: {rows} rows of prompts for {total} layers, the last {count} of which have gates other than 0: "
        "expected prefix_length, how many of them belong to one layer"
    )


def leftover_of(
    source: Source, keys: MetaKeys, kept: "re.Pattern[str] | None"
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Tensors with no place in the adapter, by their names without `llama.`, and what to say of them."""
    encoder = [plain for plain in keys.rest if _ENCODER.fullmatch(plain)]
    rest = {plain: name for plain, name in keys.rest.items() if plain not in encoder}
    known = [plain for plain in rest if kept is not None and kept.fullmatch(plain)]
    loaded = source.load(rest.values())
    notes: tuple[str, ...] = ()
    if known:
        parts = dict.fromkeys(plain.partition(".")[0] for plain in known)
        notes += (f"kept beside the adapter for load_conditioning, which needs their encoder: {', '.join(parts)}",)
    left_out = len(encoder) + len(keys.base)
    if left_out:
        notes += (f"left out: {left_out} tensors of the frozen models themselves",)
    return {plain: loaded[name] for plain, name in rest.items()}, notes + unknown_note(set(rest) - set(known))


def write_v1(path: Path, state: AdapterState) -> tuple[str, ...]:
    """Writes a new file as LLaMA-Adapter V1 has them: prompts of the last layers and gates [1, H, 1, 1] of all layers.

    Returns:
        Notes on what a reader of the file must know.

    Raises:
        ValueError: V1 has nothing that does the same as this adapter; the message says why.
        OSError: the file cannot be written, or there is one already.
    """
    refuse_tuning(state, "official V1")
    layers, total = last_layers(state, "official V1"), state.base["num_hidden_layers"]
    heads = state.base.get("num_attention_heads")
    if heads is None:
        raise ValueError("num_attention_heads: official V1 has a gate for every head; name the base model that tells")
    tensors = {"adapter_query.weight": torch.cat([state.tensors[f"layers.{layer}.prompt"] for layer in layers])}
    for layer in range(total):
        gate = state.tensors[f"layers.{layer}.gate"] if layer in layers else torch.zeros(heads)
        tensors[f"layers.{layer}.attention.gate"] = gate.expand(heads).reshape(1, heads, 1, 1).clone()
    save_new(path, tensors)
    how = "" if state.config.gate == "tanh" else "; read it back with gate identity, not the default tanh"
    return (f"gates are meant with {state.config.gate}, which the file does not say{how}",)
