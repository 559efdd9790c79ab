"""Adapters of LLaMA2-Accessory: `prefix` [L, 1, P, C] and `prefix_gate` [L, H] of the last L layers, gates through tanh.

Optionally `prefix_new_gate` [L], biases, norms and a LoRA with Meta's names. Prompts become keys and values by the tuned
projections. Files of the whole model put `llma.` in front of each key.
"""

import re
from dataclasses import replace

from llama_adapter_kernels.formats.meta_names import assemble, sort_keys, tuning_of
from llama_adapter_kernels.formats.official import leftover_of
from llama_adapter_kernels.formats.reading import (
    Choices,
    Reading,
    Source,
    expect_names,
    expect_shape,
    load_floating,
    refuse_gate,
)

_VISUAL = re.compile(r"(visual_query|(visual_blocks|visual_proj|visual_proj_norm|clip_proj|clip_proj_norm)\..+)")


def read(source: Source, choices: Choices) -> Reading:
    """The adapter of a LLaMA2-Accessory file.

    Raises:
        ValueError: keys are missing or do not fit each other.
    """
    refuse_gate(choices, "tanh", "LLaMA2-Accessory")
    keys = sort_keys(source)
    expect_names(source, [name for name in ("prefix", "prefix_gate") if name not in keys.rest])
    names = {name: keys.rest.pop(name) for name in ("prefix", "prefix_gate", "prefix_new_gate") if name in keys.rest}
    shape = source.shapes[names["prefix"]]
    if len(shape) != 4 or shape[1] != 1 or 0 in shape:
        raise ValueError(f"{source.path}: {names['prefix']}: expected [layers, 1, prompts, hidden], got {list(shape)}")
    count = shape[0]
    gate_shape = source.shapes[names["prefix_gate"]]
    if len(gate_shape) != 2 or gate_shape[0] != count:
        raise ValueError(f"{source.path}: {names['prefix_gate']}: expected [{count}, heads], got {list(gate_shape)}")
    if "prefix_new_gate" in names:
        expect_shape(source, names["prefix_new_gate"], (count,), "one per layer with prompts")
    # Only what is tuned in all layers tells how many there are; without that the prompts may be for all or for the last.
    total = keys.layers()
    notes: tuple[str, ...] = ()
    if not total:
        total = max(int(choices.base.get("num_hidden_layers", count)), count)
        if "num_hidden_layers" not in choices.base:
            notes = (f"a model of {count} layers, as many as have prompts: the file does not tell",)
    if total < count:
        raise ValueError(f"{source.path}: prompts for {count} layers, other keys for {total}: expected at most as many")
    loaded, rounded = load_floating(source, names.values())
    leftover, left = leftover_of(source, keys, _VISUAL)
    gates = loaded[names["prefix_gate"]]
    new = loaded[names["prefix_new_gate"]] if "prefix_new_gate" in names else None
    adapted = range(total - count, total)
    tuning = tuning_of(source, keys, total, "tuned", new_gate=new is not None)
    reading = assemble(
        source, choices, keys, loaded[names["prefix"]][:, 0],
        {layer: gates[place].view(1, -1, 1, 1) for place, layer in enumerate(adapted)},
        {layer: new[place].reshape(1) for place, layer in enumerate(adapted)} if new is not None else {},
        total, "tanh", tuning, leftover,
    )  # fmt: skip
    return replace(reading, notes=(*notes, *rounded, *reading.notes, *left))
