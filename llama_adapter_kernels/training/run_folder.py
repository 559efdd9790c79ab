"""The output folder of a fine-tuning run: what may be written into it, and whether a run can go on."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from llama_adapter_kernels.errors import UserError
from llama_adapter_kernels.training.data import Example

RUN_FILE = "run.json"
CHECKPOINT = "checkpoint-"
CSV_FILE = "training_log.csv"
TENSORBOARD_FOLDER = "tensorboard"


def last_checkpoint(output: Path) -> Path | None:
    """The newest complete checkpoint of a run. Incomplete ones do not exist under this name."""
    return max(checkpoints(output), key=step_of, default=None)


def step_of(checkpoint: Path) -> int:
    """The optimizer step after which a checkpoint was saved."""
    return int(checkpoint.name.removeprefix(CHECKPOINT))


def checkpoints(output: Path) -> list[Path]:
    """All complete checkpoints, in no order."""
    return [path for path in output.glob(f"{CHECKPOINT}*") if path.name.removeprefix(CHECKPOINT).isdigit()]


def check_output(output: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuses a folder with something in it unless --resume or --overwrite says what to do with it."""
    if resume and overwrite:
        raise UserError("--resume and --overwrite: expected one of them, got both")
    if output.exists() and not output.is_dir():
        raise UserError(f"{output}: expected a folder, it is a file")
    if not output.exists() or not any(output.iterdir()):
        return
    if not resume and not overwrite:
        raise UserError(f"{output} exists and is not empty: --resume continues its run, --overwrite replaces it")
    if not (output / RUN_FILE).exists():
        flag = "resume" if resume else "overwrite"
        raise UserError(f"{output}: --{flag}: no earlier run in it, {RUN_FILE} is missing; nothing was touched")


def prepare_output(output: Path, run: dict[str, Any], *, resume: bool) -> None:
    """Creates the folder, or clears an earlier run from it, and notes the run; a resumed run must be the noted one.

    Only checkpoints and logs are removed: the adapter of an earlier run stays until the new one replaces it.

    Raises:
        UserError: the settings differ from those of the run to resume; both sides are named.
    """
    path = output / RUN_FILE
    if resume and path.exists():
        earlier = _flat(json.loads(path.read_text()))
        now = _flat(json.loads(json.dumps(run)))
        differences = [
            f"{name} was {earlier.get(name)}, is {now.get(name)}"
            for name in sorted(earlier | now)
            if earlier.get(name) != now.get(name)
        ]
        if differences:
            raise UserError(f"{output}: --resume needs the run's own settings and data: {'; '.join(differences)}")
        return
    try:
        output.mkdir(parents=True, exist_ok=True)
        for folder in (*checkpoints(output), output / TENSORBOARD_FOLDER):
            shutil.rmtree(folder, ignore_errors=True)
        (output / CSV_FILE).unlink(missing_ok=True)
        path.write_text(json.dumps(run, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"{output}: {error.strerror}") from None


def data_fingerprint(examples: list[Example]) -> str:
    """SHA-256 of all tokens and labels: the same data with the same tokenizer and length."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps([example.tokens, example.prompt_length]).encode())
    return digest.hexdigest()


def _flat(run: dict[str, Any]) -> dict[str, Any]:
    return {**{name: value for name, value in run.items() if name != "settings"}, **run["settings"]}
