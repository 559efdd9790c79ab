"""What official files bring for images and sound, as a conditioning of this package.

The projections of LLaMA-Adapter V2 multimodal are the conditioning "queries", those of ImageBind-LLM "imagebind", those of
MU-LLaMA "mu_llama"; here are their names. The frozen encoder in front of them is in no such file.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from llama_adapter_kernels.adapters.conditioning.config import ConditioningConfig, build_conditioning
from llama_adapter_kernels.formats.files import listed

_QUERIES = (
    (re.compile(r"visual_query\.weight|visual_query"), "queries"),
    (re.compile(r"clip_proj\.(weight|bias)"), r"input_projection.\1"),
    (re.compile(r"clip_proj_norm\.(weight|bias)"), r"input_norm.\1"),
    (re.compile(r"visual_blocks\.(\d+)\.(norm1|norm2)\.(weight|bias)"), r"blocks.\1.\2.\3"),
    (re.compile(r"visual_blocks\.(\d+)\.attn\.(qkv|proj)\.(weight|bias)"), r"blocks.\1.\2.\3"),
    (re.compile(r"visual_blocks\.(\d+)\.mlp\.(fc1|fc2)\.(weight|bias)"), r"blocks.\1.\2.\3"),
    (re.compile(r"visual_proj\.(weight|bias)"), r"output_projection.\1"),
    (re.compile(r"visual_proj_norm\.(weight|bias)"), r"output_norm.\1"),
)
_BLOCK = re.compile(r"(image_bind|mu_mert)_(norm|f1|f2|f3)_([1-9])\.weight")


class Visual(NamedTuple):
    """A conditioning that is in the leftover of an adapter.

    Attributes:
        config: of the conditioning; encoder is "", as the file does not say which one it was.
        tensors: of the conditioning's module, by its names.
        used: the leftover's names that they come from.
    """

    config: ConditioningConfig
    tensors: dict[str, Tensor]
    used: frozenset[str]


def find_conditioning(leftover: Mapping[str, Tensor], hidden_size: int, prefix_length: int) -> Visual | None:
    """The conditioning in what an official file brought along; None if there is none.

    Raises:
        ValueError: there are parts of one, but not all, or of other sizes; both sides are named.
    """
    names = {name: _own_name(name) for name in leftover}
    named = {name: own for name, own in names.items() if own is not None}
    if not named:
        return None
    tensors = {own: leftover[name].float() for name, own in named.items()}
    first = next(iter(named))
    kind = "imagebind" if first.startswith("image_bind") else "mu_llama" if first.startswith("mu_mert") else "queries"
    config = _config(kind, tensors, hidden_size, prefix_length)
    with torch.device("meta"):  # nothing is taken for sizes that the file may not have
        module = build_conditioning(config)
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if expected != found:
        wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        both = [f"{name} {expected.get(name, 'nothing')}, got {found.get(name, 'nothing')}" for name in wrong]
        raise ValueError(f"the image or sound parts of the file: expected for a conditioning {kind}: {listed(both)}")
    return Visual(config, tensors, frozenset(named))


def _own_name(name: str) -> str | None:
    for pattern, own in _QUERIES:
        if match := pattern.fullmatch(name):
            return match.expand(own)
    refine = "" if name.startswith("image_bind") else "refine."
    if match := _BLOCK.fullmatch(name):
        kind = "norm" if match[2] == "norm" else f"{match[2]}.weight"
        return f"{refine}blocks.{int(match[3]) - 1}.{kind}"
    if match := re.fullmatch(r"(?:image_bind|mu_mert)_proj\.(weight|bias)", name):
        return f"{refine}projection.{match[1]}"
    if match := re.fullmatch(r"mu_mert_agg\.(weight|bias)", name):
        return f"mix.{match[1]}"
    return None


def _config(kind: str, tensors: Mapping[str, Tensor], hidden_size: int, prefix_length: int) -> ConditioningConfig:
    prefix = "refine." if kind == "mu_llama" else ""
    entry = tensors.get("input_projection.weight" if kind == "queries" else f"{prefix}projection.weight")
    width = entry.shape[-1] if entry is not None and entry.dim() == 2 else 1
    blocks = len({name.split("blocks.")[1].split(".")[0] for name in tensors if "blocks." in name})
    inner = entry.shape[0] if kind == "queries" and entry is not None else None
    if kind != "queries":
        first = tensors.get(f"{prefix}blocks.0.f1.weight")
        inner = first.shape[0] if first is not None else None
    mix = tensors.get("mix.weight")
    return ConditioningConfig(
        kind, width=width, hidden_size=hidden_size, prefix_length=prefix_length, inner_size=inner, blocks=blocks or None,
        depths=mix.shape[1] if mix is not None and mix.dim() == 3 else 1,
        modality="audio" if kind == "mu_llama" else "image",
        heads=16 if inner is None or inner % 16 == 0 else 1,
    )  # fmt: skip
