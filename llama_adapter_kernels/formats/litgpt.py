"""Adapters of LitGPT and of lit-llama before it, versions 1 and 2: prompts, raw gates; in 2 also scales, biases and norms.

    transformer.h.3.attn.adapter_wte.weight        [P, C]
    transformer.h.3.attn.gating_factor             [1, 1, H, 1]; in older files [1, H, 1, 1] or [1]
    transformer.h.3.attn.qkv.adapter_{scale,bias}  y = scale * (W x + b + bias); `attn.attn` up to 0.5.4, lit-llama `c_attn`

Query, key and value are one linear. Its rows are all queries, all keys, all values in `qkv` and `c_attn`; in `attn.attn` the
heads of each key-value group are together: its queries, its key, its value. Releases from 0.5.5 have the former, but still
take a prompt's keys and values from where the latter had them (AdapterConfig.prefix_rows "legacy"). lit-llama rotates
queries and keys in interleaved pairs, as Meta does.
"""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import Tensor

from llama_adapter_kernels.adapters.config import AdapterConfig
from llama_adapter_kernels.adapters.state import AdapterState
from llama_adapter_kernels.adapters.v2 import Tuning
from llama_adapter_kernels.formats import reading
from llama_adapter_kernels.formats.files import clip
from llama_adapter_kernels.formats.meta_names import rows_in_halves

_FUSED = ("attn.qkv", "attn.attn", "attn.c_attn")
LINEARS = {
    "attn.proj": "self_attn.o_proj", "attn.c_proj": "self_attn.o_proj", "mlp.fc_1": "mlp.gate_proj",
    "mlp.c_fc1": "mlp.gate_proj", "mlp.fc_2": "mlp.up_proj", "mlp.c_fc2": "mlp.up_proj", "mlp.proj": "mlp.down_proj",
    "mlp.c_proj": "mlp.down_proj",
}  # fmt: skip
NORMS = {
    "norm_1": "input_layernorm", "rms_1": "input_layernorm", "norm_2": "post_attention_layernorm",
    "rms_2": "post_attention_layernorm",
}  # fmt: skip
_PROMPT = re.compile(r"transformer\.h\.(\d+)\.attn\.(adapter_wte\.weight|gating_factor)")
_LINEAR = "|".join(re.escape(name) for name in (*_FUSED, *LINEARS))
_TUNED = re.compile(rf"transformer\.h\.(\d+)\.({_LINEAR})\.adapter_(scale|bias)")
_NORM = re.compile(rf"transformer\.h\.(\d+)\.({'|'.join(NORMS)})\.(?:weight|scale)")
_HEAD = re.compile(r"lm_head\.adapter_(scale|bias)")
_LAST_NORM = re.compile(r"transformer\.ln_f\.(?:weight|scale)")


class Heads(NamedTuple):
    """Query heads, key-value heads and elements of a head."""

    queries: int
    groups: int
    size: int


def matches(names: "set[str]") -> bool:
    """These are keys of this format."""
    return any(_PROMPT.fullmatch(name) or _TUNED.fullmatch(name) for name in names)


def read(source: reading.Source, choices: reading.Choices) -> reading.Reading:
    """The adapter of a LitGPT or lit-llama file, version 1 or 2.

    Raises:
        ValueError: keys are missing or do not fit each other, or they are of a model that is no Llama.
    """
    reading.refuse_gate(choices, "identity", "LitGPT")
    prompts, gates = _by_layer(source, "adapter_wte.weight"), _by_layer(source, "gating_factor")
    known = [*prompts.values(), *gates.values()]
    tuned = [name for name in source.shapes if any(p.fullmatch(name) for p in (_TUNED, _NORM, _HEAD, _LAST_NORM))]
    rest = [name for name in source.shapes if name not in {*known, *tuned}]
    foreign = [name for name in rest if ".adapter_" in name or "norm" in name or ".ln_f" in name]
    if foreign:
        raise ValueError(f"{source.path}: keys of a model that is no Llama: {', '.join(map(clip, foreign))}")
    numbers = [
        int(match[1]) for p in (_PROMPT, _TUNED, _NORM) for name in source.shapes if (match := p.fullmatch(name))
    ]
    total = max(numbers) + 1
    start = min(prompts.keys() | gates.keys(), default=total)
    reading.expect_names(source, [
        f"transformer.h.{layer}.attn.{what}" for layer in range(start, total)
        for found, what in ((prompts, "adapter_wte.weight"), (gates, "gating_factor")) if layer not in found
    ])  # fmt: skip
    loaded, notes = reading.load_floating(source, [*known, *tuned])
    length, hidden, heads = _sizes(source, prompts, gates)
    tensors = {f"layers.{layer}.prompt": loaded[name] for layer, name in prompts.items()}
    tensors |= {f"layers.{layer}.gate": loaded[name].reshape(-1) for layer, name in gates.items()}
    tuning = None
    if tuned:
        _expect_complete(source, tuned, total)
        hidden = hidden or loaded[next(name for name in tuned if _NORM.fullmatch(name))].shape[0]
        more, tuned_tensors = _tuned(source, choices, loaded, tuned, hidden, heads)
        notes, tensors = (*notes, *more), tensors | tuned_tensors
        tuning = Tuning(
            bias=True, scale="output", norms=True, lora_rank=0, new_gate=False,
            head=any(_HEAD.fullmatch(name) for name in tuned), prompts="tuned",
        )  # fmt: skip
    legacy, said = _legacy_rows(choices, tuned, bool(prompts))
    config = AdapterConfig(
        prefix_length=length, num_layers=(total - start) or None, gate="identity",
        gate_shape="scalar" if heads is None else "head", tuning=tuning, prefix_rows="legacy" if legacy else "own",
    )  # fmt: skip
    base = {"hidden_size": hidden, "num_hidden_layers": total} | ({"num_attention_heads": heads} if heads else {})
    state = AdapterState(config, base, tensors, source.load(rest))
    return reading.Reading(state, (*said, *notes, *reading.unknown_note(rest)))


def _by_layer(source: reading.Source, what: str) -> dict[int, str]:
    matched = ((_PROMPT.fullmatch(name), name) for name in source.shapes)
    return {int(match[1]): name for match, name in matched if match and match[2] == what}


def _sizes(source: reading.Source, prompts: Mapping[int, str], gates: Mapping[int, str]) -> tuple[int, int, int | None]:
    """P, C and H; H is None where there is one gate for all heads. All layers agree."""
    if not prompts:
        return 0, 0, None
    shape, gate = (source.shapes[next(iter(names.values()))] for names in (prompts, gates))
    if len(shape) != 2 or 0 in shape:
        raise ValueError(
            f"{source.path}: {next(iter(prompts.values()))}: expected [prompts, hidden], got {clip(list(shape))}"
        )
    heads = max(gate, default=1)
    if gate not in ((), (1,), (1, 1, heads, 1), (1, heads, 1, 1)) or heads < 1:
        raise ValueError(
            f"{source.path}: {next(iter(gates.values()))}: expected one gate per head, got {clip(list(gate))}"
        )
    for layer in prompts:
        reading.expect_shape(source, prompts[layer], shape, "as in the other layers")
        reading.expect_shape(source, gates[layer], gate, "as in the other layers")
    return shape[0], shape[1], heads if len(gate) == 4 else None


def _legacy_rows(choices: reading.Choices, tuned: Iterable[str], prompted: bool) -> tuple[bool, tuple[str, ...]]:
    """Whether prompts use the rows of releases from 0.5.5, and what to say of that."""
    named = any(".attn.qkv." in name for name in tuned)  # the name that came with 0.5.5
    if choices.legacy_rows is not None or not prompted:
        return bool(choices.legacy_rows), ()
    if named:
        return True, ("trained by LitGPT 0.5.5 or later, as attn.qkv tells: prompts use its legacy rows",)
    if any(".attn.attn." in name or ".c_attn." in name for name in tuned):
        return False, ()
    return False, ("taken for a file of LitGPT up to 0.5.4 or lit-llama; one of 0.5.5 or later needs legacy rows",)


def _expect_complete(source: reading.Source, tuned: Iterable[str], total: int) -> None:
    """Every layer has what one of them has."""
    kinds: dict[str, set[int]] = {}
    for name in tuned:
        match = _TUNED.fullmatch(name) or _NORM.fullmatch(name)
        if match:
            kinds.setdefault(name.removeprefix(f"transformer.h.{match[1]}."), set()).add(int(match[1]))
    fused = {name for name in _FUSED if any(kind.startswith(f"{name}.") for kind in kinds)}
    if len(fused) > 1:
        raise ValueError(
            f"{source.path}: expected one layout of queries, keys and values, got {', '.join(sorted(fused))}"
        )
    found = {
        target
        for name, target in LINEARS.items()
        if f"{name}.adapter_scale" in kinds and f"{name}.adapter_bias" in kinds
    }
    missing = [f"scale and bias of {target}" for target in sorted(set(LINEARS.values()) - found)]
    missing += [] if fused else ["scale and bias of queries, keys and values"]
    missing += [f"{kind} of layer {n}" for kind, layers in kinds.items() for n in range(total) if n not in layers]
    found = {target for name, target in NORMS.items() if {f"{name}.weight", f"{name}.scale"} & kinds.keys()}
    missing += sorted(set(NORMS.values()) - found)
    missing += [] if any(_LAST_NORM.fullmatch(name) for name in tuned) else ["transformer.ln_f.weight"]
    if missing:
        raise ValueError(f"{source.path}: missing keys: {', '.join(missing)}")


def _tuned(
    source: reading.Source,
    choices: reading.Choices,
    loaded: Mapping[str, Tensor],
    tuned: Iterable[str],
    hidden: int,
    heads: int | None,
) -> tuple[tuple[str, ...], dict[str, Tensor]]:
    """Notes, and scales, biases and norms by their names in AdapterState."""
    tensors: dict[str, Tensor] = {}
    split: Heads | None = None
    notes: tuple[str, ...] = ()
    for name in tuned:
        tensor = loaded[name]
        if match := _HEAD.fullmatch(name):
            tensors[f"tuning.lm_head.{match[1]}"] = tensor
        elif match := _NORM.fullmatch(name):
            tensors[f"tuning.layers.{match[1]}.{NORMS[match[2]]}.weight"] = tensor
        elif match := _TUNED.fullmatch(name):
            place = f"tuning.layers.{match[1]}"
            if match[2] not in _FUSED:
                tensors[f"{place}.{LINEARS[match[2]]}.{match[3]}"] = tensor
                continue
            if split is None:
                split, notes = _heads(source, choices, tensor.numel(), hidden, heads)
            reading.expect_shape(
                source, name, ((split.queries + 2 * split.groups) * split.size,), "queries, keys and values"
            )
            for part, rows in zip("qkv", _split_rows(tensor, match[2], split), strict=True):
                if match[2] == "attn.c_attn" and part != "v":
                    rows = rows_in_halves(rows, split.size)
                tensors[f"{place}.self_attn.{part}_proj.{match[3]}"] = rows
        else:
            tensors["tuning.norm.weight"] = tensor
    return notes, tensors


def _heads(
    source: reading.Source, choices: reading.Choices, rows: int, hidden: int, heads: int | None
) -> tuple[Heads, tuple[str, ...]]:
    """How the rows of the fused linear divide into heads: by the base model, else by the gates and the rows."""
    base = choices.base
    if {"num_attention_heads", "num_key_value_heads", "head_dim"} <= base.keys():
        return Heads(base["num_attention_heads"], base["num_key_value_heads"], base["head_dim"]), ()
    if heads is None or hidden % heads:
        raise ValueError(
            f"{source.path}: heads of queries, keys and values: expected the base model to tell, the file does not"
        )
    size = hidden // heads
    groups, odd = divmod(rows - heads * size, 2 * size)
    if groups < 1 or odd or heads % groups:
        raise ValueError(
            f"{source.path}: {rows} rows of queries, keys and values: no whole heads of {size} for {heads} queries"
        )
    return Heads(heads, groups, size), (f"{groups} key-value heads of {size} elements, as the rows tell",)


def _split_rows(rows: Tensor, layout: str, heads: Heads) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of queries, keys and values [.. D] from those of the fused linear."""
    if layout != "attn.attn":
        sizes = [heads.queries * heads.size, heads.groups * heads.size, heads.groups * heads.size]
        query, key, value = rows.split(sizes)
        return query.clone(), key.clone(), value.clone()
    grouped = rows.view(heads.groups, heads.queries // heads.groups + 2, heads.size)
    return grouped[:, :-2].reshape(-1), grouped[:, -2].reshape(-1), grouped[:, -1].reshape(-1)
