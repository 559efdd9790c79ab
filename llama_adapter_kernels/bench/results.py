"""The result file: JSON with a version number; a file of another version is refused.

{"format": "llama-adapter-kernels benchmark", "version": 1, "recorded": UTC date, "machine": {...}, "method": {...},
 "ceilings": {...}, "measurements": [...]}; every time in seconds, every size in bytes, rates per second.
"""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

FORMAT = "llama-adapter-kernels benchmark"
VERSION = 1
CLOCKS = ("cpu_clock_mhz", "gpu_clocks_mhz")  # facts that move from run to run
Status = Literal["timed", "wrong", "unavailable"]


class ResultError(ValueError):
    """The file is not a result file of this version; the message says why."""


@dataclass
class Measurement:
    """One contestant in one race. Without a time: `status` says wrong or unavailable, and `reason` why. With one, `reason`
    tells what was different about it: a call that could not be captured as a graph.
    """

    case: str
    title: str
    question: str
    mode: str
    dtype: str
    shape: dict[str, int]
    sweep: str | None
    peer: str
    label: str
    ours: bool
    prefix_length: int  # 0: attention alone
    status: Status
    reason: str | None = None
    median: float | None = None  # seconds per call
    quartiles: tuple[float, float] | None = None
    rounds: int = 0
    repeats: int = 0  # calls per round
    flop: float = 0.0
    bytes: float = 0.0
    peak_memory: int | None = None  # bytes on top of the inputs
    worst_error: float | None = None  # error / what the rule of `testing` allows, the worst of output and gradients

    @property
    def race(self) -> tuple[str, str, str]:
        return self.case, self.mode, self.dtype


@dataclass
class Results:
    machine: dict[str, Any]
    method: dict[str, Any]
    ceilings: dict[str, float]
    recorded: str
    measurements: list[Measurement] = field(default_factory=list)

    def races(self) -> dict[tuple[str, str, str], dict[str, Measurement]]:
        """{(case, mode, dtype): {peer: measurement}}, in the order they were run."""
        found: dict[tuple[str, str, str], dict[str, Measurement]] = {}
        for measurement in self.measurements:
            found.setdefault(measurement.race, {})[measurement.peer] = measurement
        return found

    def save(self, path: Path) -> None:
        """Rewrites the whole file, so that an interrupted run leaves a valid one; one measurement per line."""
        document = {"format": FORMAT, "version": VERSION, **asdict(self)}
        measurements = ",\n".join(json.dumps(entry) for entry in document.pop("measurements"))
        head = json.dumps(document, indent=1).removesuffix("\n}")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".partial")
        temporary.write_text(f'{head},\n "measurements": [\n{measurements}\n]}}\n')
        temporary.replace(path)


def load(path: Path) -> Results:
    """Reads a result file.

    Raises:
        ResultError: not a result file, one of another version, or one with missing or unknown fields.
    """
    try:
        document = json.loads(path.read_text())
    except FileNotFoundError:
        raise ResultError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ResultError(f"{path}: not JSON: {error}") from error
    if not isinstance(document, dict) or document.pop("format", None) != FORMAT:
        raise ResultError(f"{path}: not a result file of `llama-adapter bench`")
    version = document.pop("version", None)
    if version != VERSION:
        raise ResultError(
            f"{path}: result version {version}, this program reads version {VERSION}; run the benchmark again"
        )
    _check_fields(path, "the file", document, Results)
    measurements = document.pop("measurements")
    if not isinstance(measurements, list):
        raise ResultError(f"{path}: measurements: expected a list, got {type(measurements).__name__}")
    for number, entry in enumerate(measurements):
        _check_fields(path, f"measurement {number}", entry, Measurement)
        entry["quartiles"] = None if entry["quartiles"] is None else tuple(entry["quartiles"])
    return Results(**document, measurements=[Measurement(**entry) for entry in measurements])


def merge(results: list[Results], names: list[str]) -> Results:
    """Several files of one machine and commit as one; a race in two of them is an error.

    Raises:
        ResultError: machines or commits differ, or a race occurs twice.
    """
    first, *others = results
    merged = Results(first.machine, first.method, dict(first.ceilings), first.recorded, list(first.measurements))
    for result, name in zip(others, names[1:], strict=True):
        for fact in sorted(first.machine.keys() | result.machine.keys()):
            mine, its = first.machine.get(fact), result.machine.get(fact)
            if fact not in CLOCKS and mine != its:
                raise ResultError(
                    f"{name}: {fact} is {its!r}, in {names[0]} it is {mine!r}; one report is of one machine"
                )
        twice = {entry.race for entry in merged.measurements} & {entry.race for entry in result.measurements}
        if twice:
            raise ResultError(f"{name}: {' '.join(min(twice))} is in another file too")
        merged.measurements += result.measurements
        merged.ceilings = {key: max(rate, merged.ceilings.get(key, 0.0)) for key, rate in result.ceilings.items()} | {
            key: rate for key, rate in merged.ceilings.items() if key not in result.ceilings
        }
    return merged


def _check_fields(path: Path, where: str, entry: Any, kind: type) -> None:
    if not isinstance(entry, dict):
        raise ResultError(f"{path}: {where}: expected an object, got {type(entry).__name__}")
    expected = {item.name for item in fields(kind)}
    if entry.keys() != expected:
        missing, unknown = sorted(expected - entry.keys()), sorted(entry.keys() - expected)
        raise ResultError(f"{path}: {where}: missing fields {missing}, unknown fields {unknown}")
