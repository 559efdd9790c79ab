"""This package's own format: a folder with adapter.safetensors (prompts and gates) and adapter_config.json."""

import json
import os
from dataclasses import asdict
from pathlib import Path

from llama_adapter_kernels.adapters.config import AdapterConfig
from llama_adapter_kernels.adapters.state import AdapterState

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter.safetensors"
FORMAT_VERSION = 1


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
    _write_whole(folder / WEIGHTS_FILE, save(state.tensors, {"format": "pt"}))
    _write_whole(folder / CONFIG_FILE, (json.dumps(facts, indent=2) + "\n").encode())


def read(path: str | os.PathLike[str]) -> AdapterState:
    """The adapter saved in the folder `path`. Nothing is unpickled.

    Raises:
        OSError: there are no such files.
        ValueError: the files are not those of an adapter saved by this package; the message names the file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    state = _read_config(Path(path) / CONFIG_FILE)
    file = Path(path) / WEIGHTS_FILE
    if not file.exists():
        raise FileNotFoundError(f"{file}: no such file")
    try:
        state.tensors.update(load_file(file))
    except SafetensorError as error:
        raise ValueError(f"{file}: expected a safetensors file ({error})") from error
    return state


def _read_config(file: Path) -> AdapterState:
    try:
        facts = json.loads(file.read_text())
        version = facts["format_version"]
        if version != FORMAT_VERSION:
            raise ValueError(f"expected format_version {FORMAT_VERSION}, got {version}")
        return AdapterState(AdapterConfig(**facts["adapter"]), dict(facts["base_model"]))
    except (KeyError, TypeError, ValueError) as error:  # a JSONDecodeError or a field out of range is a ValueError
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"{file}: expected the configuration of an adapter saved by this package ({what})") from error


def _write_whole(path: Path, content: bytes) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(aside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
