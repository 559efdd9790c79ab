"""Adapters of PEFT's ADAPTION_PROMPT: a folder with adapter_config.json and adapter_model.safetensors (or .bin).

One prompt [1, P, C] and one raw gate [1] for each of the last layers. The configuration is only compared with the tensors:
the path of a base model in it is not followed.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from llama_adapter_kernels.adapters.config import AdapterConfig
from llama_adapter_kernels.adapters.state import AdapterState
from llama_adapter_kernels.adapters.v2 import Tuning
from llama_adapter_kernels.formats import reading
from llama_adapter_kernels.formats.files import clip, new_folder
from llama_adapter_kernels.formats.writing import effective_gates, last_layers, refuse_tuning

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_KEY = re.compile(r"base_model\.model\.(?:model\.)?layers\.(\d+)\.self_attn\.adaption_(prompt|gate)")
_GPT2 = re.compile(r"base_model\.model\.transformer\.h\.\d+\.attn\.adaption_(prompt|gate)")
_MODEL_TYPES = ("llama", "mistral")  # what peft.tuners.adaption_prompt knows, besides GPT-2


def matches(names: "set[str]") -> bool:
    """These are keys of this format."""
    return any(_KEY.fullmatch(name) or _GPT2.fullmatch(name) for name in names)


def read(source: reading.Source, choices: reading.Choices) -> reading.Reading:
    """The adapter of a PEFT folder, or of its file of weights alone.

    Raises:
        ValueError: keys are missing or do not fit each other or the configuration; or it is for GPT-2, whose prefix PEFT
            adds behind the output projection, as no other implementation does.
    """
    reading.refuse_gate(choices, "identity", "PEFT")
    if any(_GPT2.fullmatch(name) for name in source.shapes):
        raise ValueError(
            f"{source.path}: for GPT-2, where PEFT adds the prefix behind the output projection and not before it: "
            "no adapter of this package does the same"
        )
    found: dict[str, dict[int, str]] = {"prompt": {}, "gate": {}}
    for name in source.shapes:
        if match := _KEY.fullmatch(name):
            found[match[2]][int(match[1])] = name
    layers = sorted(found["prompt"].keys() | found["gate"].keys())
    missing = [f"layers.{n}.self_attn.adaption_{what}" for what in found for n in layers if n not in found[what]]
    reading.expect_names(source, missing)
    shape = source.shapes[found["prompt"][layers[0]]]
    if len(shape) != 3 or shape[0] != 1 or 0 in shape:
        raise ValueError(
            f"{source.path}: {found['prompt'][layers[0]]}: expected [1, prompts, hidden], got {clip(list(shape))}"
        )
    for layer in layers:
        reading.expect_shape(source, found["prompt"][layer], shape, "as in the other layers")
        reading.expect_shape(source, found["gate"][layer], (1,), "one gate per layer")
    if layers != list(range(layers[0], layers[0] + len(layers))):
        raise ValueError(f"{source.path}: expected prompts of the last layers without a gap, got layers {clip(layers)}")
    _compare(source, len(layers), shape[1])
    loaded, notes = reading.load_floating(source, [*found["prompt"].values(), *found["gate"].values()])
    tensors = {f"layers.{layer}.prompt": loaded[found["prompt"][layer]][0].clone() for layer in layers}
    tensors |= {f"layers.{layer}.gate": loaded[found["gate"][layer]] for layer in layers}
    unknown = [name for name in source.shapes if not _KEY.fullmatch(name)]
    config = AdapterConfig(prefix_length=shape[1], num_layers=len(layers), gate="identity", gate_shape="scalar")
    base = {"hidden_size": shape[2], "num_hidden_layers": layers[-1] + 1}
    bias = (
        "a bias of the output projection counts twice in PEFT: only loading onto a model reproduces that, a file cannot"
    )
    return reading.Reading(
        AdapterState(config, base, tensors, source.load(unknown)), (*notes, bias, *reading.unknown_note(unknown))
    )


def _compare(source: reading.Source, layers: int, length: int) -> None:
    """The configuration, where there is one, says the same as the tensors."""
    told = source.facts.get("adapter_config")
    if told is None:
        return
    kind = told.get("peft_type")
    if kind != "ADAPTION_PROMPT":
        raise ValueError(f"{source.path}: peft_type: expected ADAPTION_PROMPT, got {clip(repr(kind))}")
    expected = {"adapter_len": length, "adapter_layers": layers}
    for name, value in expected.items():
        if told.get(name) != value or type(told.get(name)) is not int:
            raise ValueError(
                f"{source.path}: {name}: {value} in the weights, {clip(repr(told.get(name)))} in {CONFIG_FILE}"
            )


def with_output_bias(state: AdapterState, biases: Mapping[int, Tensor | None]) -> AdapterState:
    """The adapter on a model whose output projections have a bias.

    PEFT sends the prefix branch through the output projection by itself, so in its layers that bias counts twice, whatever
    the gate is. Here the branches are added first; the second bias becomes a tuned one.

    Args:
        biases: of the output projection of each layer of the model, [hidden], or None.
    """
    if all(bias is None for bias in biases.values()):
        return state
    adapted = set(state.config.layer_numbers(len(biases)))
    only_bias = Tuning(("o_proj",), "none", norms=False, lora_rank=0, new_gate=False, prompts="base")
    tensors = {
        f"tuning.layers.{layer}.self_attn.o_proj.bias": bias.detach().float().cpu() * (layer in adapted)
        for layer, bias in biases.items() if bias is not None
    }  # fmt: skip
    return replace(state, config=replace(state.config, tuning=only_bias), tensors=state.tensors | tensors)


def write(path: Path, state: AdapterState) -> tuple[str, ...]:
    """Writes a new folder that PEFT's PeftModel.from_pretrained reads.

    Returns:
        Notes on what is other than before.

    Raises:
        ValueError: PEFT has nothing that does the same as this adapter; the message says why.
        OSError: the folder cannot be written, or there is one already.
    """
    from safetensors.torch import save

    refuse_tuning(state, "PEFT")
    kind = state.base.get("model_type", "llama")
    if kind not in _MODEL_TYPES:
        raise ValueError(f"model_type: PEFT has adaption prompts for {', '.join(_MODEL_TYPES)}, got {kind}")
    if state.config.gate_shape != "scalar":
        raise ValueError(
            "gate_shape: PEFT has one gate per layer, this adapter has one per head: expected scalar, got head"
        )
    layers = last_layers(state, "PEFT")
    gates, notes = effective_gates(state)
    tensors: dict[str, Tensor] = {}
    for layer in layers:
        name = f"base_model.model.model.layers.{layer}.self_attn"
        tensors[f"{name}.adaption_prompt"] = state.tensors[f"layers.{layer}.prompt"][None].contiguous()
        tensors[f"{name}.adaption_gate"] = gates[layer].to(torch.float32)
    config = {
        "peft_type": "ADAPTION_PROMPT", "task_type": "CAUSAL_LM", "base_model_name_or_path": None,
        "inference_mode": True, "target_modules": "self_attn", "adapter_len": state.config.prefix_length,
        "adapter_layers": len(layers),
    }  # fmt: skip
    with new_folder(path) as folder:
        (folder / WEIGHTS_FILE).write_bytes(save(tensors, {"format": "pt"}))
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
    return notes
