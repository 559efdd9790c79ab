"""Checkpoints that are whole or known not to be: a manifest closes each, and only a renamed folder is ever removed."""

import hashlib
import json
import os
import shutil
from pathlib import Path

CHECKPOINT = "checkpoint-"
MANIFEST = "manifest.json"
# A save goes here first and is renamed when it is complete. The dot keeps both out of every search for checkpoints.
STAGING = ".saving"
_REMOVING = ".removing-"


def step_of(checkpoint: Path) -> int:
    """The optimizer step after which a checkpoint was saved."""
    return int(checkpoint.name.removeprefix(CHECKPOINT))


def checkpoints(output: Path) -> list[Path]:
    """All checkpoint folders, oldest first, whole or not."""
    found = [path for path in output.glob(f"{CHECKPOINT}*") if path.name.removeprefix(CHECKPOINT).isdecimal()]
    return sorted(found, key=step_of)


def last_whole_checkpoint(output: Path) -> tuple[Path | None, dict[Path, str]]:
    """(the newest whole checkpoint, the newer ones that are not, with what is wrong with each)."""
    broken: dict[Path, str] = {}
    for path in reversed(checkpoints(output)):
        problem = what_is_broken(path)
        if problem is None:
            return path, broken
        broken[path] = problem
    return None, broken


def write_manifest(checkpoint: Path) -> None:
    """Writes down every file of a complete checkpoint with its size and SHA-256; all of it reaches the disk."""
    files = {}
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file():
            flush(path)
            name = path.relative_to(checkpoint).as_posix()
            files[name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    write_whole(checkpoint / MANIFEST, json.dumps({"files": files}, indent=2) + "\n")


def what_is_broken(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be resumed from: the first file that is missing or not as it was saved. None: it can."""
    try:
        files = json.loads((checkpoint / MANIFEST).read_bytes())["files"]
        for name, facts in files.items():
            path = checkpoint / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != facts["bytes"] or _sha256(path) != facts["sha256"]:
                return f"{name} is not as it was saved"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return f"{MANIFEST} cannot be read"
    return None


def publish(staged: Path, final: Path) -> None:
    """Gives a complete checkpoint its name; one that is there already, incomplete, makes way."""
    if final.exists():
        remove(final)
    os.rename(staged, final)
    flush(final.parent)


def remove(folder: Path) -> None:
    """Removes a folder that, whenever the process is killed, is there as a whole or not at all under its name."""
    doomed = folder.with_name(f"{_REMOVING}{folder.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    try:
        folder.rename(doomed)
    except FileNotFoundError:
        return
    shutil.rmtree(doomed, ignore_errors=True)


def remove_leftovers(output: Path) -> None:
    """What a killed process left of saving and removing."""
    for folder in (output / STAGING, *output.glob(f"{_REMOVING}*")):
        shutil.rmtree(folder, ignore_errors=True)


def write_whole(path: Path, text: str) -> None:
    """Writes a file that is complete or as it was before, whatever happens meanwhile.

    Raises:
        OSError: it could not be written.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with aside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def flush(path: Path) -> None:
    """Waits until a file or a folder's list of names is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
