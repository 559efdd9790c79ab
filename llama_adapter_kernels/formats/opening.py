"""Opening adapter files of any foreign format as a Source: what is in them, before any tensor is read."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama_adapter_kernels.formats import peft
from llama_adapter_kernels.formats.files import clip, listed, read_json, read_safetensors
from llama_adapter_kernels.formats.reading import Shape, Source
from llama_adapter_kernels.formats.torch_file import TensorRecord, TorchFile

_FOLDER_FILES = (peft.WEIGHTS_FILE, "adapter_model.bin", "lit_model.pth.adapter", "lit_model.pth.adapter_v2")
_MOST_SHARDS = 64
# Where a model is split over several files: outputs of these linears, and inputs of these.
_SPLIT = re.compile(r".*\.(w[qkv13]_bias|w[o2]_scale)")
_GATE = re.compile(r".*\.attention\.gate")


def open_source(path: Path) -> Source:
    """An adapter file, or the one that a folder holds, or a folder of shards.

    Raises:
        OSError: it cannot be read.
        ValueError: it is nothing that holds tensors, or the file lies about what it holds.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if not path.is_dir():
        return _open_file(path, {})
    facts: dict[str, Any] = {}
    if (path / peft.CONFIG_FILE).is_file():
        facts["adapter_config"] = read_json(path / peft.CONFIG_FILE)
    for name in _FOLDER_FILES:
        if (path / name).is_file():
            return _open_file(path / name, facts)
    shards = sorted(path.glob("*.pth"))
    if not shards:
        raise FileNotFoundError(
            f"{path}: expected {', '.join(_FOLDER_FILES)} or *.pth in this folder, got none of them"
        )
    if len(shards) > _MOST_SHARDS:
        raise ValueError(f"{path}: expected at most {_MOST_SHARDS} *.pth files, got {len(shards)}")
    sources = [_open_file(shard, facts) for shard in shards]
    return sources[0] if len(sources) == 1 else _merged(path, sources)


def _open_file(path: Path, facts: Mapping[str, Any]) -> Source:
    with path.open("rb") as file:
        start = file.read(9)
    if path.suffix == ".safetensors" or (len(start) == 9 and start[8:] == b"{"):
        tensors = read_safetensors(path)
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        return Source(path, shapes, facts, lambda names: {name: tensors[name] for name in names})
    file_of_torch = TorchFile(path)
    content = file_of_torch.content
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a dictionary of tensors, got a {type(content).__name__}")
    place: tuple[str, ...] = ("model",) if isinstance(content.get("model"), dict) else ()
    inner = content["model"] if place else content
    shapes = {
        name: value.shape for name, value in inner.items() if isinstance(value, TensorRecord) and isinstance(name, str)
    }
    if not shapes:
        raise ValueError(f"{path}: expected named tensors, got {listed(inner) or 'nothing'}")
    beside = {name: value for name, value in content.items() if name in ("args", "config", "epoch")}
    return Source(path, shapes, {**facts, **beside}, lambda names: file_of_torch.tensors(place, names))


def _merged(path: Path, shards: list[Source]) -> Source:
    """Shards of one model as one source: what is split is put together, what every shard has is taken once."""
    first = shards[0]
    for shard in shards[1:]:
        different = first.shapes.keys() ^ shard.shapes.keys()
        if different:
            raise ValueError(
                f"{path}: {first.path.name} and {shard.path.name} differ in keys: {listed(sorted(different))}"
            )
        changed = [name for name in first.shapes if first.shapes[name] != shard.shapes[name]]
        if changed:
            raise ValueError(f"{path}: {first.path.name} and {shard.path.name} differ in shapes: {listed(changed)}")

    def shape(name: str) -> Shape:
        whole = first.shapes[name]
        return (len(shards) * whole[0], *whole[1:]) if _SPLIT.fullmatch(name) and whole else whole

    def load(names: Iterable[str]) -> dict[str, Tensor]:
        names = list(names)
        parts = [shard.load(names) for shard in shards]
        return {name: _joined(path, name, [part[name] for part in parts]) for name in names}

    return Source(path, {name: shape(name) for name in first.shapes}, first.facts, load)


def _joined(path: Path, name: str, parts: list[Tensor]) -> Tensor:
    if _SPLIT.fullmatch(name):
        return torch.cat(parts)
    if _GATE.fullmatch(name) and parts[0].dim() == 4 and parts[0].shape[1] % len(parts) == 0:
        # Every shard has the gates of all heads, but trained those of its own heads only.
        own = parts[0].shape[1] // len(parts)
        return torch.cat([part[:, place * own : (place + 1) * own] for place, part in enumerate(parts)], dim=1)
    if not all(torch.equal(parts[0], part) for part in parts[1:]):
        raise ValueError(f"{path}: {clip(name)}: expected the same in every shard, got different values")
    return parts[0]
