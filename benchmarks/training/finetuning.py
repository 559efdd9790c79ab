"""Fine-tuning on this CPU, beside what people use: tokens per second and peak memory of whole training loops.

    python -m benchmarks.training.finetuning --model FOLDER --data ROWS.json --output benchmarks/results/training/NAME.json

Contestants are processes that take turns, a step at a time, so that a drift of the machine hits all alike; figures are
medians over rounds after a first step that does not count. Memory is the most that a process held while it trained, less
what it held before the model was read.
"""

import argparse
import json
import multiprocessing
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.training.finetuning_contestants import CONTESTANTS
from benchmarks.training.finetuning_process import Race, run
from llama_adapter_kernels.bench import machine

PATIENCE = 600.0  # seconds for one message of a contestant


class Contestant:
    """One process, seen from the driver; `problem` says why it is out of the race."""

    def __init__(self, name: str, race: Race) -> None:
        self.name, self.problem, self.samples = name, "", list[tuple[float, int]]()
        self.memory = self.parameters = 0
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=run, args=(name, race, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self._expect("ready")

    def step(self) -> None:
        """One step; its seconds and tokens are added to the samples."""
        if not self.problem:
            self.connection.send("go")
            found = self._expect("step")
            if found is not None:
                self.samples.append(found)
                self._expect("ready", "done")

    def finish(self) -> None:
        """Ends the process and takes its peak memory."""
        if not self.problem and not self.memory:
            self.connection.send("stop")
            self._expect("done")
        self.process.join(timeout=30)
        if self.process.is_alive():
            self.process.terminate()

    def _expect(self, *kinds: str) -> Any:
        try:
            kind, value = self.connection.recv() if self.connection.poll(PATIENCE) else ("error", "no answer")
        except EOFError:
            kind, value = "error", "the process ended"
        if kind == "done":
            self.memory, self.parameters = value
        if kind not in kinds:
            self.problem = str(value)
            return None
        return value

    def result(self) -> dict[str, Any]:
        """Medians, without the first step."""
        if self.problem or len(self.samples) < 2:
            return {"problem": self.problem or "too few steps"}
        rates = [tokens / seconds for seconds, tokens in self.samples[1:]]
        return {
            "tokens_per_second": round(statistics.median(rates), 1), "samples": [round(rate, 1) for rate in rates],
            "tokens_per_step": round(statistics.mean(tokens for _, tokens in self.samples[1:])),
            "peak_bytes": self.memory, "parameters": self.parameters,
        }  # fmt: skip


def race_of(race: Race, names: Sequence[str], rounds: int) -> dict[str, Any]:
    """The contestants' results by name."""
    contestants = []
    for name in names:
        contestant = Contestant(name, race)
        contestant.step()
        contestants.append(contestant)
        print(f"{race.dtype} {name}: {contestant.problem or 'ready'}", flush=True)
    for number in range(rounds):
        turn = number % len(contestants)
        for contestant in contestants[turn:] + contestants[:turn]:
            contestant.step()
    found = {}
    for contestant in contestants:
        contestant.finish()
        found[contestant.name] = contestant.result()
        print(f"{race.dtype} {contestant.name}: {found[contestant.name]}", flush=True)
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of SmolLM2-135M-Instruct or another Llama-like model")
    parser.add_argument("--data", type=Path, required=True, help="instruction rows, JSON")
    parser.add_argument("--rounds", type=int, default=3, help="measured steps of every contestant")
    parser.add_argument("--rows", type=int, default=8, help="of a step; even, because padded ones go in twos")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--only", nargs="+", choices=list(CONTESTANTS), default=list(CONTESTANTS))
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    recorded: dict[str, Any] = {
        "machine": machine.facts(torch.device("cpu")), "model": Path(given.model).name, "data": given.data.name,
        "rows": given.rows, "rounds": given.rounds, "titles": {name: CONTESTANTS[name][0] for name in given.only},
        "results": {},
    }  # fmt: skip
    given.output.parent.mkdir(parents=True, exist_ok=True)
    for dtype in given.dtype:
        race = Race(given.model, given.data, dtype, given.threads, given.rows, steps=given.rounds + 2)
        recorded["results"][dtype] = race_of(race, given.only, given.rounds)
        given.output.write_text(json.dumps(recorded, indent=1) + "\n")


if __name__ == "__main__":
    main()
