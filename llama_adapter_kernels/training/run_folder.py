"""The output folder of a fine-tuning run: what may be written into it, by whom, and whether a run can go on."""

import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llama_adapter_kernels.errors import UserError
from llama_adapter_kernels.training.chats import Chat
from llama_adapter_kernels.training.checkpoints import checkpoints, remove, remove_leftovers, write_whole
from llama_adapter_kernels.training.data import Row
from llama_adapter_kernels.training.settings import Settings
from llama_adapter_kernels.training.tokens import Example

log = logging.getLogger(__name__)

RUN_FILE = "run.json"
CSV_FILE = "training_log.csv"
EVAL_FILE = "evaluation_log.csv"
TENSORBOARD_FOLDER = "tensorboard"
CAPACITY = "tokens_per_micro_batch"
# What a resumed run may change: it goes on for longer, and other micro-batches change rounding alone.
_MAY_CHANGE = ("epochs", "max_steps", CAPACITY)
_MEANING = {"data_sha256": "the data", "base_sha256": "the base model's weights", "eval_sha256": "the held-out data"}


def check_output(output: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuses a folder with something in it unless --resume or --overwrite says what to do with it; writes nothing."""
    if resume and overwrite:
        raise UserError("--resume and --overwrite: expected one of them, got both")
    if output.exists() and not output.is_dir():
        raise UserError(f"{output}: expected a folder, it is a file")
    try:
        if not output.exists() or not any(output.iterdir()):
            _check_creatable(output)
            return
    except OSError as error:
        raise UserError(f"{output}: {error.strerror}") from None
    if not resume and not overwrite:
        raise UserError(f"{output} exists and is not empty: --resume continues its run, --overwrite replaces it")
    if not (output / RUN_FILE).exists():
        flag = "resume" if resume else "overwrite"
        raise UserError(f"{output}: --{flag}: no earlier run in it, {RUN_FILE} is missing; nothing was touched")


@contextmanager
def claim(output: Path) -> Iterator[None]:
    """Creates the folder and keeps other processes from training into it; the claim ends with the process at the latest.

    Raises:
        UserError: another process has it, or it cannot be created.
    """
    descriptor = None
    try:
        output.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(output, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{output}: another process is training into this folder") from None
    except OSError as error:
        if descriptor is None or error.errno not in (errno.EBADF, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL):
            raise UserError(f"{output}: {error.strerror}") from None
        log.warning("%s: this file system has no locks: see to it that one process at a time trains into it", output)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def prepare_output(output: Path, run: dict[str, Any], *, resume: bool) -> None:
    """Clears an earlier run from a claimed folder and notes the new one; a resumed run must be the noted one.

    Only checkpoints and logs are removed: the adapter of an earlier run stays until the new one replaces it.

    Args:
        run: model, data_sha256, base_sha256 and settings.

    Raises:
        UserError: settings, data or base model differ from those of the run to resume; both sides are named.
    """
    path = output / RUN_FILE
    try:
        going_on = resume and path.exists()
        if going_on:
            run |= _check_same(output, run)
        remove_leftovers(output)
        if not going_on:
            for folder in checkpoints(output):
                remove(folder)
            shutil.rmtree(output / TENSORBOARD_FOLDER, ignore_errors=True)
            for name in (CSV_FILE, EVAL_FILE):
                (output / name).unlink(missing_ok=True)
        write_whole(path, json.dumps(run, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"{output}: {error.strerror}") from None


def data_fingerprint(rows: Sequence[Row | Chat], examples: Sequence[Example]) -> str:
    """SHA-256 over the text of all rows and over their tokens and labels: the same text, tokenizer and lengths."""
    digest = hashlib.sha256()
    for row, example in zip(rows, examples, strict=True):
        digest.update(json.dumps(asdict(row), default=str).encode())
        digest.update(json.dumps([example.tokens, example.prompt_length, example.given]).encode())
    return digest.hexdigest()


def remembered_capacity(output: Path) -> int | None:
    """Tokens per micro-batch that the run in `output` was carried out with; None where it is new."""
    try:
        found: int | None = json.loads((output / RUN_FILE).read_bytes()).get(CAPACITY)
        return found
    except (OSError, ValueError, AttributeError):
        return None


def remember_capacity(output: Path, capacity: int) -> None:
    """Notes it, so that a resumed run rounds as an unbroken one does, however much memory is free then."""
    path = output / RUN_FILE
    try:
        write_whole(path, json.dumps({**json.loads(path.read_bytes()), CAPACITY: capacity}, indent=2) + "\n")
    except (OSError, ValueError) as error:
        log.warning("%s: %s", path, error)


def noted_template(folder: Path) -> str | None:
    """The template that the adapter in `folder` was trained with, where the folder is that of its run."""
    try:
        found: str | None = json.loads((folder / RUN_FILE).read_bytes())["settings"].get("template")
        return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _check_same(output: Path, run: dict[str, Any]) -> dict[str, Any]:
    """What the noted run has and `run` does not know yet.

    Raises:
        UserError: they are different runs.
    """
    path = output / RUN_FILE
    try:
        noted = json.loads(path.read_bytes())
        earlier = {**_flat({"settings": json.loads(json.dumps(asdict(Settings())))}), **_flat(noted)}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise UserError(f"{path} cannot be read: the run cannot go on, --overwrite starts it anew") from None
    now = _flat(json.loads(json.dumps(run)))
    differences = [
        f"{_MEANING[name]} changed" if name in _MEANING else f"{name} was {earlier.get(name)}, is {now.get(name)}"
        for name in sorted(earlier | now)
        if earlier.get(name) != now.get(name)
        and name not in (*_MAY_CHANGE, "model")  # the weights say which model it is
    ]
    if differences:
        raise UserError(f"{output}: --resume needs the run's own settings, data and model: {'; '.join(differences)}")
    return {CAPACITY: noted[CAPACITY]} if CAPACITY in noted else {}


def _check_creatable(output: Path) -> None:
    """Raises OSError where the folder could not be created or written."""
    above = output.absolute()
    while not above.exists():
        above = above.parent
    if not above.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, f"{above} is not a folder")
    if not os.access(above, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, f"{above} cannot be written")


def _flat(run: dict[str, Any]) -> dict[str, Any]:
    return {**{name: value for name, value in run.items() if name != "settings"}, **run["settings"]}
