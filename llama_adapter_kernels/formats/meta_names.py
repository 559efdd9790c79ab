"""Meta's names for the parts of a LLaMA model, as official adapters use them, and what they are called in transformers.

Meta rotates queries and keys in interleaved pairs, transformers in halves, so rows of wq and wk lie in another order there.
Whatever is added to the outputs of these two must be reordered in the same way; prompts and gates need not be.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

from torch import Tensor

from llama_adapter_kernels.adapters.config import AdapterConfig
from llama_adapter_kernels.adapters.state import AdapterState
from llama_adapter_kernels.adapters.v2 import Tuning
from llama_adapter_kernels.formats.reading import Choices, Reading, Source, expect_shape, load_floating

LINEARS = {
    "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj", "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj", "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}  # fmt: skip
NORMS = {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_ROTATED = ("self_attn.q_proj", "self_attn.k_proj")
_LINEAR = "|".join(re.escape(name) for name in LINEARS)
_TUNED = (
    (re.compile(rf"layers\.(\d+)\.({_LINEAR})[_.]bias"), "bias"),
    (re.compile(rf"layers\.(\d+)\.({_LINEAR})_scale"), "scale"),
    (re.compile(r"layers\.(\d+)\.(attention|feed_forward)\.lora_(w[qkvo123])_l1\.weight"), "lora_a"),
    (re.compile(r"layers\.(\d+)\.(attention|feed_forward)\.lora_(w[qkvo123])_l2\.weight"), "lora_b"),
    (re.compile(rf"layers\.(\d+)\.({_LINEAR})\.lora_a\.weight"), "lora_a"),
    (re.compile(rf"layers\.(\d+)\.({_LINEAR})\.lora_b\.weight"), "lora_b"),
)
_NORM = re.compile(r"layers\.(\d+)\.(attention_norm|ffn_norm)\.weight")
_GATE = re.compile(r"layers\.(\d+)\.attention\.(gate|new_gate)")
_BASE = re.compile(rf"layers\.\d+\.({_LINEAR})\.weight|tok_embeddings\.weight|output\.weight|rope\.freqs")
_HEAD_DIM = 128  # of every LLaMA from 7B to 65B
_PREFIXES = ("llama.", "llma.")  # the second is an old spelling in files
Key = tuple[int, str]


@dataclass
class MetaKeys:
    """The keys of a file by their roles; the values are names in the file.

    Attributes:
        gates, new_gates: by layer.
        tuned: by kind ("bias", "scale", "lora_a", "lora_b"), then by layer and the linear's name in transformers.
        norms: by layer and the norm's name in transformers; the final norm is (-1, "norm").
        base: the frozen model's own weights.
        rest: everything else, by its name without a `llama.` in front.
    """

    gates: dict[int, str] = field(default_factory=dict)
    new_gates: dict[int, str] = field(default_factory=dict)
    tuned: dict[str, dict[Key, str]] = field(default_factory=dict)
    norms: dict[Key, str] = field(default_factory=dict)
    base: list[str] = field(default_factory=list)
    rest: dict[str, str] = field(default_factory=dict)

    def layers(self) -> int:
        """How many layers the model has, as far as these keys tell."""
        numbered = [*self.gates, *(layer for layer, _ in self.norms)]
        numbered += [layer for keys in self.tuned.values() for layer, _ in keys]
        return max(numbered, default=-1) + 1


def sort_keys(source: Source) -> MetaKeys:
    """The keys of `source` by their roles.

    Raises:
        ValueError: something is there with and without `llama.` in front.
    """
    keys = MetaKeys()
    seen: dict[str, str] = {}
    for name in source.shapes:
        plain = next((name.removeprefix(prefix) for prefix in _PREFIXES if name.startswith(prefix)), name)
        if plain in seen:
            raise ValueError(f"{source.path}: {seen[plain]} and {name}: expected one of them, got both")
        seen[plain] = name
        if match := _GATE.fullmatch(plain):
            (keys.gates if match[2] == "gate" else keys.new_gates)[int(match[1])] = name
        elif match := _NORM.fullmatch(plain):
            keys.norms[int(match[1]), NORMS[match[2]]] = name
        elif plain == "norm.weight":
            keys.norms[-1, "norm"] = name
        elif _BASE.fullmatch(plain):
            keys.base.append(name)
        elif not _sort_tuned(plain, name, keys):
            keys.rest[plain] = name
    return keys


def _sort_tuned(plain: str, name: str, keys: MetaKeys) -> bool:
    for pattern, kind in _TUNED:
        if match := pattern.fullmatch(plain):
            linear = LINEARS[".".join(match.groups()[1:])]
            keys.tuned.setdefault(kind, {})[int(match[1]), linear] = name
            return True
    return False


def tuning_of(source: Source, keys: MetaKeys, layers: int, prompts: str, new_gate: bool = False) -> Tuning | None:
    """What the file tunes besides prompts and gates, complete for all layers; None: nothing.

    Raises:
        ValueError: what is there for one layer is missing for another; all missing keys are named.
    """
    missing: list[str] = []
    for kind in {"lora_a", "lora_b"} & keys.tuned.keys():  # neither half is of use alone
        other = keys.tuned.get("lora_b" if kind == "lora_a" else "lora_a", {})
        missing += [f"the other half of {name}" for key, name in keys.tuned[kind].items() if key not in other]
    for kind, found in keys.tuned.items():
        linears = {linear for _, linear in found}
        complete = LINEARS.values() if kind != "bias" else linears
        missing += [
            f"{kind} of {linear} in layer {layer}"
            for layer in range(layers) for linear in complete if (layer, linear) not in found
        ]  # fmt: skip
    norms = {(-1, "norm"), *((layer, norm) for layer in range(layers) for norm in NORMS.values())}
    if keys.norms:
        missing += [f"{norm}.weight of layer {layer}" for layer, norm in sorted(norms - keys.norms.keys())]
    if missing:
        raise ValueError(f"{source.path}: missing keys: {', '.join(missing)}")
    new_gate = new_gate or bool(keys.new_gates)
    if not (keys.tuned or keys.norms or new_gate):
        return None
    biased = {linear.rpartition(".")[2] for _, linear in keys.tuned.get("bias", {})}
    return Tuning(
        bias=len(biased) == len(LINEARS) or (tuple(sorted(biased)) if biased else False),
        scale="input" if "scale" in keys.tuned else "none",
        norms=bool(keys.norms),
        lora_rank=_lora_rank(source, keys),
        new_gate=new_gate,
        prompts=prompts,
    )


def _lora_rank(source: Source, keys: MetaKeys) -> int:
    found = keys.tuned.get("lora_a", {})
    if not found:
        return 0
    first = next(iter(found.values()))
    if len(source.shapes[first]) != 2:
        raise ValueError(f"{source.path}: {first}: expected [rank, in], got {list(source.shapes[first])}")
    rank = source.shapes[first][0]
    for (_, linear), name in found.items():
        expect_shape(
            source, name, (rank, source.shapes[name][-1] if source.shapes[name] else 0), f"rank {rank}, {linear}"
        )
    return rank


def rows_in_halves(tensor: Tensor, head_dim: int) -> Tensor:
    """Rows of wq or wk ([H D, ...]) from Meta's order, pair by pair, to that of transformers, half by half."""
    return tensor.view(-1, head_dim // 2, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def load_tuned(source: Source, keys: MetaKeys, head_dim: int) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The tuned tensors by their names in AdapterState, in the order of transformers, and notes.

    Raises:
        ValueError: outputs of wq or wk are no whole heads, or a value is not finite.
    """
    names = {
        f"tuning.layers.{layer}.{linear}.{kind}": name
        for kind, found in keys.tuned.items() for (layer, linear), name in found.items()
    }  # fmt: skip
    names |= {
        "tuning.norm.weight" if layer < 0 else f"tuning.layers.{layer}.{norm}.weight": name
        for (layer, norm), name in keys.norms.items()
    }
    loaded, notes = load_floating(source, names.values())
    tensors = {}
    for name, inside in names.items():
        tensor = loaded[inside]
        module, _, kind = name.rpartition(".")
        if module.endswith(_ROTATED) and kind in ("bias", "lora_b"):
            if not tensor.dim() or tensor.shape[0] % head_dim or head_dim % 2:
                raise ValueError(f"{source.path}: {inside}: expected heads of {head_dim}, got {list(tensor.shape)}")
            tensor = rows_in_halves(tensor, head_dim)
        tensors[name] = tensor
    return tensors, notes


def assemble(
    source: Source,
    choices: Choices,
    keys: MetaKeys,
    table: Tensor | None,
    gates: Mapping[int, Tensor],
    new_gates: Mapping[int, Tensor],
    total: int,
    activation: str,
    tuning: Tuning | None,
    leftover: dict[str, Tensor],
) -> Reading:
    """The adapter that these parts make.

    Args:
        table: prompts [L, P, C] of the last L layers; None: there are none.
        gates, new_gates: float32, by layer, for those L layers: [1, H, 1, 1] or [H] or [1].
        total: layers of the model.
        activation: of the gates.
        tuning: see tuning_of.
        leftover: what the adapter has no place for.

    Raises:
        ValueError: parts do not fit each other; the message gives both sides.
    """
    count, length, hidden_size = table.shape if table is not None else (0, 0, _hidden_size(source, keys))
    adapted = range(total - count, total)
    shapes = {tuple(gates[layer].shape) for layer in adapted}
    if len(shapes) > 1 or not all(len(shape) in (1, 4) and prod(shape) == max(shape) > 0 for shape in shapes):
        raise ValueError(f"{source.path}: gates: expected one per head or one per layer, got shapes {sorted(shapes)}")
    # [1]: one for all heads, as in very early files; [1, H, 1, 1] has one for each, be it for a single head.
    heads = next((prod(shape) for shape in shapes if len(shape) == 4 or prod(shape) > 1), None)
    tensors: dict[str, Tensor] = {}
    for place, layer in enumerate(adapted):
        assert table is not None
        tensors[f"layers.{layer}.prompt"] = table[place].clone()
        tensors[f"layers.{layer}.gate"] = gates[layer].reshape(-1)
        if new_gates:
            tensors[f"layers.{layer}.new_gate"] = new_gates[layer].reshape(-1)
    if heads is not None and hidden_size % heads:
        raise ValueError(f"{source.path}: {heads} gates per layer do not divide the hidden size {hidden_size}")
    head_dim, notes = (hidden_size // heads, ()) if heads is not None else _head_dim(choices, hidden_size)
    tuned, more = load_tuned(source, keys, head_dim)
    base: dict[str, Any] = {"model_type": "llama", "hidden_size": hidden_size, "num_hidden_layers": total}
    if heads is not None:
        base |= {"num_attention_heads": heads, "head_dim": head_dim}
    config = AdapterConfig(
        prefix_length=length, num_layers=count or None, gate=activation, gate_shape="scalar" if heads is None else "head",
        tuning=tuning,
    )  # fmt: skip
    notes = notes if keys.tuned.get("bias") or keys.tuned.get("lora_b") else ()
    return Reading(AdapterState(config, base, tensors | tuned, leftover), (*notes, *more))


def _hidden_size(source: Source, keys: MetaKeys) -> int:
    """C of a file without prompts: norms have it, scales of queries, too."""
    named = [*keys.norms.values(), *(n for (_, linear), n in keys.tuned.get("scale", {}).items() if linear in _ROTATED)]
    named += [name for (_, linear), name in keys.tuned.get("bias", {}).items() if linear.endswith("o_proj")]
    sizes = {source.shapes[name] for name in named}
    if len(sizes) != 1 or len(next(iter(sizes))) != 1:
        raise ValueError(f"{source.path}: expected norms or scales of one hidden size, got {sorted(sizes)}")
    return next(iter(sizes))[0]


def _head_dim(choices: Choices, hidden_size: int) -> tuple[int, tuple[str, ...]]:
    if "head_dim" in choices.base:
        return int(choices.base["head_dim"]), ()
    head_dim = _HEAD_DIM if hidden_size % _HEAD_DIM == 0 else hidden_size
    return head_dim, (f"heads of {head_dim} elements, as in every LLaMA from 7B to 65B: the file does not tell",)
