"""Reading JSON and safetensors files that may lie, and writing files and folders whole or not at all.

Everything that a file says about itself is checked against its true size before memory is taken for it.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

LONGEST_JSON = 4 << 20  # bytes; the largest configuration in the wild has some 10 KB
LONGEST_HEADER = 32 << 20  # bytes; a safetensors header takes some 100 bytes per tensor
_SHOWN_NAMES = 8
_SHOWN_CHARACTERS = 120


def clip(text: object) -> str:
    """`text` for a message: printable and short, whatever a file holds."""
    line = "".join(character if character.isprintable() else "?" for character in str(text)[: 2 * _SHOWN_CHARACTERS])
    return line if len(line) <= _SHOWN_CHARACTERS else f"{line[:_SHOWN_CHARACTERS]}..."


def listed(names: Iterable[object], every: bool = False) -> str:
    """Names for a message, the first few and how many more there are; `every` lists all of them."""
    names = list(names)
    shown = names if every else names[:_SHOWN_NAMES]
    more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
    return ", ".join(clip(name) for name in shown) + more


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is too large, not JSON, no object, or names something twice.
    """
    size = path.stat().st_size
    if size > LONGEST_JSON:
        raise ValueError(f"{path}: expected at most {LONGEST_JSON} bytes of JSON, got {size}")
    return parse_object(path.read_bytes(), str(path))


def parse_object(content: bytes, where: str) -> dict[str, Any]:
    """The JSON object in `content`; `where` names it in errors.

    Raises:
        ValueError: it is not JSON, no object, or names something twice.
    """
    try:
        parsed = json.loads(content.decode("utf-8"), object_pairs_hook=_without_duplicates, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:  # a JSONDecodeError or a UnicodeDecodeError is a ValueError
        raise ValueError(f"{where}: expected a JSON object ({clip(error)})") from error
    if not isinstance(parsed, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(parsed).__name__}")
    return parsed


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{clip(twice)!r} is there twice")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not such a file, it says more than it holds, or it names a tensor twice.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, LONGEST_HEADER):
            raise ValueError(f"{path}: expected a safetensors file (its header would have {length} of {size} bytes)")
        header = parse_object(file.read(length), f"{path}: expected a safetensors file; its header")
    try:
        # The library checks what the header says of each tensor: its type and shape, and that all of them fill the file.
        return load_file(path)
    except (SafetensorError, ValueError, TypeError, KeyError, OverflowError, AttributeError) as error:
        names = listed(header)
        raise ValueError(f"{path}: expected a safetensors file ({clip(error)}); it names {names}") from error


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file aside, flushes it and renames it: `path` is the old file or the new one, never a part.

    Raises:
        OSError: it cannot be written; what was there stays.
    """
    with written_whole(path) as aside, open(aside, "wb") as file:
        file.write(content)


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A name to write a new file to; when the block ends well the file is flushed and becomes `path`.

    Raises:
        OSError: it cannot be written; what was there stays.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield aside
        _flush(aside)
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill; when the block ends well it becomes `path`, otherwise nothing is left of it.

    Raises:
        FileExistsError: there is something at `path` already, other than an empty folder.
        OSError: it cannot be written.
    """
    refuse_existing(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.mkdir()
    try:
        probe = aside / "probe"
        probe.touch()
        mode = (
            probe.stat().st_mode & 0o777
        )  # what the umask allows; some libraries write files that only their owner reads
        probe.unlink()
        yield aside
        for file in aside.iterdir():
            file.chmod(mode)
            _flush(file)
        if path.exists():
            path.rmdir()
        os.rename(aside, path)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def refuse_existing(path: Path) -> None:
    """Refuses a place for a new folder that is not free.

    Raises:
        FileExistsError: there is something at `path` already, other than an empty folder.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path}: expected a new folder, there is something already")


def _flush(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
