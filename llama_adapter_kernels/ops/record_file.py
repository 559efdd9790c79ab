"""Files of what races have shown, one entry a line, which a release carries and `llama-adapter bench` rewrites."""

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

Entry = TypeVar("Entry")


class RecordError(ValueError):
    """A record of another version, or one with something else in it; the message says which file and what."""


def load(path: Path, kind: str, version: int, entry: type[Entry]) -> list[Entry]:
    """The entries of a record; none where there is no file.

    Raises:
        RecordError: the file is not a record of this kind and version.
    """
    if not path.exists():
        return []
    try:
        document = json.loads(path.read_text())
        if (document["format"], document["version"]) != (kind, version):
            raise RecordError(f"{path}: expected {kind!r} version {version}")
        return [entry(**fields) for fields in document["entries"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, RecordError):
            raise
        raise RecordError(f"{path}: no {kind} ({error})") from error


def save(path: Path, kind: str, version: int, entries: Iterable[Any]) -> None:
    """Writes the record whole, in the order of the entries (dataclasses)."""
    lines = ",\n  ".join(json.dumps(asdict(entry)) for entry in entries)
    body = f"\n  {lines}\n" if lines else ""
    temporary = path.with_suffix(".partial")
    temporary.write_text(f'{{"format": {json.dumps(kind)}, "version": {version}, "entries": [{body}]}}\n')
    temporary.replace(path)
