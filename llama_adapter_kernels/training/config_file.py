"""All options of a fine-tuning run in one YAML file: read as --config, written back into the output folder."""

import difflib
from collections.abc import Mapping
from dataclasses import Field, replace
from pathlib import Path
from typing import Any, get_args

from llama_adapter_kernels.errors import UserError
from llama_adapter_kernels.training.checkpoints import write_whole
from llama_adapter_kernels.training.settings import Execution, Settings, Task, options_of
from llama_adapter_kernels.versions import versions

CONFIG_FILE = "config.yaml"
MADE_WITH = "made_with"  # what is noted for people; not an option
PACKAGES = ("torch", "transformers", "accelerate")
# What a run does once, not what it is.
_ONCE = ("resume", "overwrite", "dry_run")
_SHORT = ("cpu", "gradient_checkpointing", "tensorboard")
# Of these pairs the second one alone decides where it is given.
INSTEAD = (("batch_size", "tokens_per_step"), ("micro_batch_size", "tokens_per_micro_batch"))


def known_options() -> dict[str, Field[Any]]:
    """Every option by its key."""
    return options_of(Task) | options_of(Settings) | options_of(Execution)


def read_config(path: Path) -> dict[str, Any]:
    """The options in a YAML file: keys are those of the command line, with - or _ between words. null: as if not given.

    Raises:
        UserError: it cannot be read, has a key that is no option, or a value of another kind; the message says which.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        said = " ".join(str(error).split())[:300]
        raise UserError(f"--config {path}: not a YAML file that can be read: {said}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"--config {path}: expected options and their values (epochs: 5), got {type(content).__name__}")
    known = known_options()
    found: dict[str, Any] = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name == MADE_WITH:
            continue
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}?" if close else "llama-adapter finetune --help lists all"
            raise UserError(f"--config {path}: {key}: no such option; {hint}")
        if name in found:
            raise UserError(f"--config {path}: {name} is there twice")
        if value is not None:
            found[name] = _checked(f"--config {path}: {key}", value, known[name].type)
    return found


def write_config(output: Path, task: Task, settings: Settings, execution: Execution) -> None:
    """Writes what a run was really given, so that `--config` repeats it, with what made it.

    Raises:
        OSError: it could not be written.
    """
    import yaml

    values = effective(task, settings, execution) | {MADE_WITH: versions(PACKAGES)}
    head = f"# llama-adapter finetune --config {CONFIG_FILE} does this run again; further options change it.\n"
    write_whole(output / CONFIG_FILE, head + yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


def effective(task: Task, settings: Settings, execution: Execution) -> dict[str, Any]:
    """Every option that a run has, by its key; those that do not count are left out, short forms written in full."""
    values: dict[str, Any] = {}
    execution = replace(
        execution,
        device="cpu" if execution.on_cpu else execution.device,
        memory="low" if execution.low_memory else execution.memory,
        report_to="csv" if execution.reports == ("auto",) and not execution.tensorboard else execution.report_to,
    )
    for one in (task, settings, execution):
        for name, option in options_of(type(one)).items():
            value = getattr(one, option.name)
            if value is not None and name not in (*_ONCE, *_SHORT):
                values[name] = _plain(value)
    for replaced, by in INSTEAD:
        if by in values:
            values.pop(replaced, None)
    return values


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return str(value) if isinstance(value, Path) else value


def _checked(where: str, value: Any, expected: Any) -> Any:
    """The value as the command line takes it.

    Raises:
        UserError: it is of another kind.
    """
    kinds = [kind for kind in get_args(expected) if kind is not type(None)] if _is_optional(expected) else [expected]
    kind = kinds[0]
    if getattr(kind, "__origin__", None) is list:
        values = value if isinstance(value, list) else [value]
        return [_checked(where, one, get_args(kind)[0]) for one in values]
    if getattr(kind, "__origin__", None) is tuple:
        if not isinstance(value, list) or len(value) != len(get_args(kind)):
            raise UserError(f"{where}: expected a list of {len(get_args(kind))} numbers, got {value!r}")
        return [_checked(where, one, part) for one, part in zip(value, get_args(kind), strict=True)]
    if kind is float and isinstance(value, str):  # YAML 1.1 takes 9e-3 for text
        try:
            return float(value)
        except ValueError:
            pass
    words: Mapping[Any, tuple[str, tuple[type, ...]]] = {
        int: ("a whole number", (int,)), float: ("a number", (int, float)), bool: ("true or false", (bool,)),
    }  # fmt: skip
    said, fitting = words.get(kind, ("text", (str,)))
    if not isinstance(value, fitting) or (isinstance(value, bool) and kind is not bool):
        raise UserError(f"{where}: expected {said}, got {value!r}")
    return value


def _is_optional(expected: Any) -> bool:
    return type(None) in get_args(expected)
