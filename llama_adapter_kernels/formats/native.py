"""This package's own format: a folder with zero_gate_adapter.json and adapter.safetensors.

Prompts and gates, and what the adapter tunes in the model, are in adapter.safetensors; what came with an adapter of another
project and has no place in it, such as the projections of an image model, is in leftover.safetensors.
"""

import json
import os
from dataclasses import asdict
from pathlib import Path

from llama_adapter_kernels.adapters.config import AdapterConfig
from llama_adapter_kernels.adapters.state import AdapterState
from llama_adapter_kernels.formats.checking import check_state
from llama_adapter_kernels.formats.files import clip, read_json, read_safetensors, write_whole

CONFIG_FILE = "zero_gate_adapter.json"  # not adapter_config.json: that name makes other libraries take it for PEFT's
WEIGHTS_FILE = "adapter.safetensors"
LEFTOVER_FILE = "leftover.safetensors"
FORMAT_VERSION = 1
_KEYS = {"format_version", "base_model", "adapter"}


def is_native(path: Path) -> bool:
    """The folder `path` is one of this format."""
    return path.is_dir() and (path / CONFIG_FILE).is_file()


def write(path: str | os.PathLike[str], state: AdapterState) -> None:
    """Writes the files of an adapter into the folder `path`, which is made where it is missing.

    Each file is written aside, flushed and renamed: when the disk fills, what was there stays whole.

    Raises:
        OSError: the folder cannot be written.
    """
    from safetensors.torch import save

    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    facts = {"format_version": FORMAT_VERSION, "base_model": state.base, "adapter": asdict(state.config)}
    if state.leftover:
        write_whole(folder / LEFTOVER_FILE, save(state.leftover, {"format": "pt"}))
    else:
        (folder / LEFTOVER_FILE).unlink(missing_ok=True)
    write_whole(folder / WEIGHTS_FILE, save(state.tensors, {"format": "pt"}))
    write_whole(folder / CONFIG_FILE, (json.dumps(facts, indent=2) + "\n").encode())


def read(path: str | os.PathLike[str]) -> AdapterState:
    """The adapter saved in the folder `path`. Nothing is unpickled, and nothing is larger in memory than it is on disk.

    Raises:
        OSError: there are no such files.
        ValueError: the files are not those of an adapter saved by this package; the message names the file.
    """
    folder = Path(path)
    state = _read_config(folder / CONFIG_FILE)
    for name, tensors in ((WEIGHTS_FILE, state.tensors), (LEFTOVER_FILE, state.leftover)):
        file = folder / name
        if file.exists():
            tensors.update(read_safetensors(file))
        elif name == WEIGHTS_FILE:
            raise FileNotFoundError(f"{file}: no such file")
    check_state(state, str(folder / WEIGHTS_FILE))
    return state


def _read_config(file: Path) -> AdapterState:
    expected = f"{file}: expected the configuration of an adapter saved by this package"
    facts = read_json(file)
    version = facts.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise ValueError(f"{expected}; expected format_version {FORMAT_VERSION}, got {clip(repr(version))}")
    if facts.keys() != _KEYS:
        raise ValueError(f"{expected} with {', '.join(sorted(_KEYS))}; got {clip(', '.join(sorted(facts)))}")
    adapter, base = facts["adapter"], facts["base_model"]
    if not isinstance(adapter, dict) or not isinstance(base, dict):
        raise ValueError(f"{expected}; expected objects as adapter and base_model")
    try:
        return AdapterState(AdapterConfig(**adapter), base)
    except (TypeError, ValueError) as error:  # a TypeError is a field that there is not
        raise ValueError(f"{expected} ({clip(error)})") from error
