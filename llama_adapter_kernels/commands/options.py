"""Options of a command from the fields of dataclasses, and a YAML file that may give them."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from llama_adapter_kernels.errors import UserError
from llama_adapter_kernels.training.config_file import read_config
from llama_adapter_kernels.training.settings import option, options_of

Kind = TypeVar("Kind")
Command = TypeVar("Command", bound=Callable[..., None])
_COMMAND_LINE = "COMMANDLINE"


def takes(*kinds: type) -> Callable[[Command], Command]:
    """Gives a command, a function of its context and **values, an option for each field, and --config."""
    parameters = [
        _parameter("context", typer.Context, inspect.Parameter.empty),
        _parameter(
            "config",
            Annotated[
                Path | None,
                typer.Option(
                    help="YAML file with any of these options (epochs: 5); the command line wins.",
                    callback=_config,
                    is_eager=True,
                ),
            ],
            None,
        ),
    ]
    for kind in kinds:
        for name, one in options_of(kind).items():
            declared = (option(name),) if one.metadata.get("flag") else ()
            default = inspect.Parameter.empty if one.default is MISSING else one.default
            annotation = Annotated[one.type, typer.Option(*declared, help=one.metadata["help"])]  # type: ignore[name-defined]
            parameters.append(_parameter(name, annotation, default))

    def decorate(command: Command) -> Command:
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return command

    return decorate


def gathered(kind: type[Kind], values: dict[str, Any]) -> Kind:
    """One of the dataclasses from the values of all options."""
    return kind(**{one.name: values[name] for name, one in options_of(kind).items()})


def settle(context: Any, values: dict[str, Any], pairs: Sequence[tuple[str, str]], defaults: dict[str, Any]) -> None:
    """Of two options that exclude each other the one on the command line wins over the one of the --config.

    Args:
        values: of all options; the losers get their `defaults`.

    Raises:
        UserError: both were given in the same place.
    """
    for pair in pairs:
        places = [context.get_parameter_source(name).name for name in pair]
        given = [name for name, place in zip(pair, places, strict=True) if place != "DEFAULT"]
        if len(given) < 2 or not all(values[name] for name in pair):
            continue
        if places[0] == places[1]:
            raise UserError(f"{option(pair[0])}, {option(pair[1])}: expected one of them, got both")
        loser = next(name for name, place in zip(pair, places, strict=True) if place != _COMMAND_LINE)
        values[loser] = defaults[loser]


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)


def _config(context: typer.Context, path: Path | None) -> Path | None:
    """What the file says takes the place of the defaults."""
    if path is not None:
        context.default_map = read_config(path)
    return path
