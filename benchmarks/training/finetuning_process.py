"""The process of a contestant in the race of fine-tuning, and where its training loop waits for its turn.

The loop stops before every step until the driver sends "go", and says afterwards how long the step took and how many tokens
it saw, padding not counted.
"""

import contextlib
import ctypes
import gc
import logging
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

MAX_LENGTH = 512  # tokens of an example


@dataclass(frozen=True)
class Race:
    """What all contestants train on.

    Args:
        rows: of a step.
        tokens_at_once: most tokens of a packed forward pass; a step adds up as many of them as hold its rows.
        rows_at_once: of a padded forward pass, about as many tokens; a step adds up rows / rows_at_once of them.
    """

    model: str
    data: Path
    dtype: str
    threads: int = 2
    rows: int = 8
    tokens_at_once: int = 512
    rows_at_once: int = 2
    steps: int = 4


class Gate:
    """Where a training loop waits for its turn and reports a step."""

    def __init__(self, connection: Any) -> None:
        self.connection, self.started, self.tokens = connection, 0.0, 0

    def before_step(self) -> None:
        self.connection.send(("ready", None))
        if self.connection.recv() != "go":
            raise StopRace
        self.started = time.perf_counter()

    def saw(self, tokens: int) -> None:
        self.tokens += tokens

    def after_step(self) -> None:
        self.connection.send(("step", (time.perf_counter() - self.started, self.tokens)))
        self.tokens = 0


class StopRace(Exception):
    """The race is over: the driver wants no further step."""


def run(name: str, race: Race, connection: Any) -> None:
    """The life of a contestant's process; what goes wrong is sent to the driver."""
    torch.set_num_threads(race.threads)
    logging.disable(logging.WARNING)
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (loops print what the driver is told already)
    try:
        _race(name, race, connection)
    except Exception as error:
        connection.send(("error", f"{type(error).__name__}: {error}".splitlines()[0][:300]))


def _race(name: str, race: Race, connection: Any) -> None:
    import peft  # noqa: F401  (imports belong to no one's memory)

    from benchmarks.training.finetuning_contestants import CONTESTANTS
    from llama_adapter_kernels.models import load_model_and_tokenizer
    from llama_adapter_kernels.training.data import read_rows
    from llama_adapter_kernels.training.tokens import tokenize

    forget_peak()  # what imports left behind goes back before it is counted
    base = status_bytes("VmRSS")
    model, tokenizer = load_model_and_tokenizer(race.model, getattr(torch, race.dtype))
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    examples = tokenize(_first(read_rows(race.data), race), tokenizer, MAX_LENGTH)
    gate = Gate(connection)
    with tempfile.TemporaryDirectory() as folder:
        loop, trained = CONTESTANTS[name][1](race, gate, (model, tokenizer, examples), Path(folder))
        del model
        forget_peak()
        with contextlib.suppress(StopRace):
            loop()
        connection.send(("done", (status_bytes("VmHWM") - base, trained)))


def _first(rows: Sequence[Any], race: Race) -> list[Any]:
    """The rows that the steps need, and some more: packing looks ahead."""
    return list(rows[: 2 * race.rows * (race.steps + 1)])


def forget_peak() -> None:
    """The high-water mark of resident memory starts anew: reading the weights is not training (Linux)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def status_bytes(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024
