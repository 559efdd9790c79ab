"""Reading of annotation files, with errors that name the file and what was expected in it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llama_adapter_kernels.errors import UserError


def read_json(path: Path) -> Any:
    """The parsed file.

    Raises:
        UserError: it cannot be read, or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason})") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not valid JSON: {error.msg}") from None
    except (RecursionError, ValueError) as error:  # nested too deep, or a number of thousands of digits
        raise UserError(f"{path}: not JSON that can be read ({type(error).__name__}: {str(error)[:80]})") from None


def field_of(entry: Any, name: str, kind: type | tuple[type, ...], where: str) -> Any:
    """`entry[name]`, of the expected type.

    Raises:
        UserError: it is missing or of another type; the message says where.
    """
    if not isinstance(entry, dict):
        raise UserError(f"{where}: expected an object, got {type(entry).__name__}")
    if name not in entry:
        raise UserError(f'{where}: field "{name}" is missing')
    value = entry[name]
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        expected = " or ".join(k.__name__ for k in kinds)
        raise UserError(f'{where}: field "{name}": expected {expected}, got {type(value).__name__}')
    return value


def only_file(folder: Path, patterns: Sequence[str]) -> Path:
    """The one file of `folder` that fits the first pattern that any file fits.

    Raises:
        UserError: none fits, or several do.
    """
    for pattern in patterns:
        found = sorted(folder.glob(pattern))
        if len(found) == 1:
            return found[0]
        if found:
            raise UserError(f"{folder}: expected one file {pattern}, got {', '.join(f.name for f in found[:5])}")
    raise UserError(f"{folder}: no file {' or '.join(patterns)}")


def media_file(path: Path, where: str) -> Path:
    """`path` if it is there.

    Raises:
        UserError: it is not; the message names the item.
    """
    if not path.is_file():
        raise UserError(f"{where}: no file {path}")
    return path
