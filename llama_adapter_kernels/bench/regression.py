"""Have the fused kernels become slower? Speed-ups over two SDPA calls against recorded bars of the same processor.

A ratio of two medians of one interleaved race does not care for the clock frequency, much less for the day than a time.
A bar is the median of several runs. A race below its bar is run again and its best run counts: a disturbance passes, a
regression stays.
"""

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_adapter_kernels.bench.results import ResultError, Results

VERSION = 1
ALLOWED_LOSS = 0.15


def processor(results: Results) -> str:
    machine = results.machine
    return machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads, {machine['our_instruction_set']}"


def load_bars(path: Path, results_processor: str) -> dict[str, float]:
    """{"case mode dtype": speed-up} for a processor.

    Raises:
        ResultError: no such file, another version, or no bars for this processor (the message says how to record them).
    """
    document = _read(path)
    bars: dict[str, float] | None = document["bars"].get(results_processor)
    if bars is None:
        known = "; ".join(document["bars"]) or "none"
        raise ResultError(
            f"{path}: no bars for {results_processor}; there are bars for: {known}. To record them, on a quiet machine and "
            f"with kernels that are known to be good: llama-adapter bench-check --bars {path} --record"
        )
    return bars


def record_bars(path: Path, results_processor: str, runs: dict[str, list[float]]) -> None:
    """Replaces the processor's bars by the medians of `runs` {race: speed-ups}, keeps those of others."""
    document: dict[str, Any] = _read(path) if path.exists() else {"version": VERSION, "bars": {}}
    document["bars"][results_processor] = {race: round(statistics.median(ratios), 3) for race, ratios in runs.items()}
    path.write_text(json.dumps(document, indent=1) + "\n")


@dataclass(frozen=True)
class Verdict:
    race: str
    bar: float
    ratio: float | None  # None: nothing was timed

    @property
    def ok(self) -> bool:
        return self.ratio is not None and self.ratio >= self.bar * (1 - ALLOWED_LOSS)

    def __str__(self) -> str:
        if self.ratio is None:
            return f"{self.race}: not timed, the bar is {self.bar:.2f}x"
        change = self.ratio / self.bar - 1
        return f"{self.race}: {self.ratio:.2f}x over two SDPA calls, the bar is {self.bar:.2f}x ({change:+.0%})"


def judge(bars: dict[str, float], runs: dict[str, list[float]]) -> list[Verdict]:
    return [Verdict(race, bar, max(runs.get(race, ()), default=None)) for race, bar in bars.items()]


def _read(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text())
    except FileNotFoundError:
        raise ResultError(f"{path}: no such file; llama-adapter bench-check --bars {path} --record makes it") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ResultError(f"{path}: not JSON: {error}") from error
    if (
        not isinstance(document, dict)
        or document.get("version") != VERSION
        or not isinstance(document.get("bars"), dict)
    ):
        found = document.get("version") if isinstance(document, dict) else None
        raise ResultError(f"{path}: bars of version {found}, this program reads version {VERSION}")
    return document
