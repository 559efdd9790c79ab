"""Mutants of the CUDA kernels, run by the emulator: all that schemata.py finds, and those of cuda_added.py.

python -m tests.mutants.cuda


    --only rows.h:100-140   of one file, and there of these lines alone
    --kinds barrier,wait    of these kinds alone: barrier wait commit zero comparison mask condition choice clip sign factor
    --seconds 60            of a core for one mutant; tests that do not fit are left out, which the verdict says
    --output FILE           verdicts as JSON
    --again FILE            of an earlier output what was not killed, alone

All of them are compiled at once. Each test then runs once without a fault, to see which mutants it reaches and how long it
takes; each mutant is tried by the tests that reach it, in a process of its own, until one of them fails. A survivor wants a
test, or the line can go, or EXPLAINED (cuda_explained.py) says why it changes nothing that a result or a count could show.
"""

import argparse
import ctypes
import hashlib
import json
import os
import pickle
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.mutants.cuda_added import ADDED
from tests.mutants.cuda_explained import EXPLAINED
from tests.mutants.driver import ROOT
from tests.mutants.schemata import Fault, Mutant, Site, schemata
from tests.support import emulator

FOLDER = ROOT / "build" / "mutants" / "cuda"
TESTS = [
    f"tests/cuda/test_cuda_{name}.py"
    for name in (
        "emulated",
        "edges",
        "exactness",
        "paths",
        "not_finite",
        "op_emulated",
        "launchers",
        "counts",
        "products",
    )
]
HEADER = """#pragma once
extern "C" {
extern int lak_active_mutant;
extern unsigned char lak_reached[];
}
inline bool lak_mutant(int number) {
  lak_reached[number] = 1;
  return lak_active_mutant == number;
}
"""
DEFINITIONS = """#include "lak_mutant.h"
extern "C" {{
__attribute__((visibility("default"))) int lak_active_mutant = -1;
__attribute__((visibility("default"))) unsigned char lak_reached[{count}] = {{}};
}}
"""


def added_to(file: str, text: str) -> list[Site]:
    """Where the faults of cuda_added.py are to be found in a file.

    Raises:
        ValueError: if the text of one does not occur there exactly once.
    """
    sites = []
    for fault in ADDED:
        if fault.file != file:
            continue
        where = fault.where or fault.old
        if text.count(where) != 1 or where.count(fault.old) != 1:
            raise ValueError(f"{fault.name}: expected its text once in {file}, got {text.count(where)} times")
        begin = text.index(where) + where.index(fault.old)
        sites.append(Site(begin, begin + len(fault.old), (Fault("added", fault.new),)))
    return sites


def changed_sources() -> tuple[dict[Path, str], list[Mutant]]:
    """The files of csrc, those of the CUDA kernels with all their mutants, and these."""
    mutants: list[Mutant] = []
    texts: dict[Path, str] = {}
    for path in sorted((ROOT / "csrc").rglob("*")):
        if not path.is_file():
            continue
        relative = path.relative_to(ROOT / "csrc")
        text = path.read_text()
        if relative.parts[0] == "cuda" and path.suffix == ".h" and "ptx" not in relative.parts:
            text, found = schemata(text, str(relative), len(mutants), added_to(str(relative), text))
            if found:
                head, rest = text.split("#pragma once\n", 1)
                line = head.count("\n") + 2  # lines keep their numbers
                text = f'{head}#pragma once\n#include "lak_mutant.h"\n#line {line}\n{rest}'
                mutants += found
        texts[relative] = text
    texts[Path("cuda/lak_mutant.h")] = HEADER
    texts[Path("cuda/lak_mutant.cu")] = DEFINITIONS.format(count=len(mutants))
    return texts, mutants


def all_mutants() -> list[Mutant]:
    return changed_sources()[1]


def write_sources() -> list[Mutant]:
    """A copy of csrc with all mutants in it. What did not change keeps its time, so that it is not compiled again."""
    texts, mutants = changed_sources()
    for relative, text in texts.items():
        emulator.write_if_changed(FOLDER / "csrc" / relative, text)
    for path in (FOLDER / "csrc").rglob("*"):
        if path.is_file() and path.relative_to(FOLDER / "csrc") not in texts:
            path.unlink()
    return mutants


@dataclass(frozen=True)
class Run:
    """What one test did without a fault."""

    seconds: float
    reached: bytes  # of each mutant whether


@dataclass(frozen=True)
class Verdict:
    outcome: str  # killed, explained, survived, undecided, not reached
    by: str = ""


class Loop:
    """A plugin of pytest: the tests are run for each mutant, in forked processes that share what was imported."""

    def __init__(self, library: Path, mutants: list[Mutant], chosen: list[Mutant], seconds: float, jobs: int) -> None:
        self.library, self.mutants, self.chosen = library, mutants, chosen
        self.seconds, self.jobs = seconds, jobs
        self.verdicts: dict[int, Verdict] = {}
        self.kills: Counter[int] = Counter()

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        emulator.load_emulator()
        loaded = ctypes.CDLL(str(self.library))
        self.active = ctypes.c_int.in_dll(loaded, "lak_active_mutant")
        self.reached = (ctypes.c_ubyte * len(self.mutants)).in_dll(loaded, "lak_reached")
        self.items = session.items
        key = hashlib.sha256(
            self.library.read_bytes() + b"".join(Path(path).read_bytes() for path in TESTS)
        ).hexdigest()
        known = FOLDER / "runs.pickle"  # of the same kernels and tests
        if known.exists() and (stored := pickle.loads(known.read_bytes()))[0] == key:
            self.runs: list[Run] = stored[1]
        else:
            self.runs = self._without_faults()
            known.write_bytes(pickle.dumps((key, self.runs)))
        print(
            f"\n{len(self.items)} tests, {sum(run.seconds for run in self.runs):.0f} s; {len(self.chosen)} mutants",
            flush=True,
        )
        self._all_mutants()
        return True

    def _passes(self, at: int) -> bool:
        from _pytest.runner import runtestprotocol

        return not any(report.failed for report in runtestprotocol(self.items[at], log=False, nextitem=None))

    def _without_faults(self) -> list[Run]:
        def of_every_job(first: int) -> list[tuple[int, Run]]:
            result = []
            for at in range(first, len(self.items), self.jobs):
                ctypes.memset(self.reached, 0, len(self.mutants))
                begin = time.process_time()
                if not self._passes(at):
                    raise RuntimeError(f"{self.items[at].nodeid} fails without a fault")
                result.append((at, Run(time.process_time() - begin, bytes(self.reached))))
            return result

        files = []
        for job in range(self.jobs):
            files.append(FOLDER / f"runs-{job}.pickle")
            files[-1].unlink(missing_ok=True)
            if os.fork() == 0:
                try:
                    files[-1].write_bytes(pickle.dumps(of_every_job(job)))
                    os._exit(0)
                except BaseException as error:
                    print(error, file=sys.stderr, flush=True)
                    os._exit(1)
        if any(os.waitstatus_to_exitcode(os.wait()[1]) != 0 for _ in files):
            raise RuntimeError("a test fails without a fault")
        runs = dict(entry for file in files for entry in pickle.loads(file.read_bytes()))
        return [runs[at] for at in range(len(self.items))]

    def _all_mutants(self) -> None:
        waiting = list(reversed(self.chosen))
        running: dict[int, tuple[Mutant, Path]] = {}
        while waiting or running:
            while waiting and len(running) < self.jobs:
                mutant = waiting.pop()
                order = self._tests_of(mutant)
                if mutant.name in EXPLAINED:
                    self._note(mutant, Verdict("explained", EXPLAINED[mutant.name]))
                    continue
                if not order:
                    self._note(mutant, Verdict("not reached"))
                    continue
                file = FOLDER / f"verdict-{mutant.number}"
                file.unlink(missing_ok=True)
                child = os.fork()
                if child == 0:
                    self._try(mutant, order, file)
                running[child] = mutant, file
            if not running:
                continue
            child, status = os.wait()
            mutant, file = running.pop(child)
            text = file.read_text().splitlines()
            file.unlink()
            code = os.waitstatus_to_exitcode(status)
            if code == 0:
                self._note(mutant, Verdict("survived"))
            elif code == 2:
                self._note(mutant, Verdict("undecided", f"{text[-1]} left out"))
            else:
                by = int(text[-1])
                self.kills[by] += 1
                how = (
                    "" if code == 1 else " (endless)" if -code == signal.SIGPROF else f" ({signal.Signals(-code).name})"
                )
                self._note(mutant, Verdict("killed", self.items[by].nodeid.split("/")[-1] + how))

    def _tests_of(self, mutant: Mutant) -> list[int]:
        """Those that reach it; first what is quick and has told much so far."""
        able = [at for at, run in enumerate(self.runs) if run.reached[mutant.number]]
        return sorted(able, key=lambda at: self.runs[at].seconds / (1 + self.kills[at]))

    def _try(self, mutant: Mutant, order: list[int], file: Path) -> None:
        """In a process of its own, which ends here: 0 survived, 1 killed, 2 tests left out."""
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1), os.dup2(null, 2)
        self.active.value = mutant.number
        code, used, left_out = 0, 0.0, 0
        for at in order:
            used += self.runs[at].seconds
            if used > self.seconds:
                left_out += 1
                continue
            with file.open("a") as out:
                print(at, file=out)
            signal.setitimer(signal.ITIMER_PROF, 10 + 5 * self.runs[at].seconds)  # ends the process
            if not self._passes(at):
                os._exit(1)
        if left_out:
            code = 2
            with file.open("a") as out:
                print(f"{left_out} of {len(order)} tests", file=out)
        os._exit(code)

    def _note(self, mutant: Mutant, verdict: Verdict) -> None:
        self.verdicts[mutant.number] = verdict
        shown = verdict.outcome if verdict.outcome in ("killed", "explained") else verdict.outcome.upper()
        print(f"{len(self.verdicts)}/{len(self.chosen)} {shown}: [{mutant.kind}] {mutant} {verdict.by}", flush=True)


def choose(mutants: list[Mutant], only: str, kinds: str) -> list[Mutant]:
    file, _, lines = only.partition(":")
    first, _, last = lines.partition("-")
    return [
        mutant
        for mutant in mutants
        if (not file or mutant.file.endswith(file))
        and (not lines or int(first) <= mutant.line <= int(last or first))
        and (not kinds or mutant.kind in kinds.split(","))
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description="Every mutant of the CUDA kernels.")
    parser.add_argument("--only", default="")
    parser.add_argument("--kinds", default="")
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--again", type=Path)
    arguments = parser.parse_args()
    mutants = write_sources()
    library = emulator.build(FOLDER / "built", FOLDER / "csrc")
    os.environ["LAK_EMULATOR"] = str(library)
    os.environ["OMP_NUM_THREADS"] = "1"
    chosen = choose(mutants, arguments.only, arguments.kinds)
    if arguments.again:
        alive = {entry["name"] for entry in json.loads(arguments.again.read_text()) if entry["outcome"] != "killed"}
        chosen = [mutant for mutant in chosen if mutant.name in alive]
    loop = Loop(library, mutants, chosen, arguments.seconds, arguments.jobs)
    code = pytest.main([*TESTS, "-q", "-p", "no:cacheprovider", "-p", "no:xdist"], plugins=[loop])
    if code not in (0, pytest.ExitCode.NO_TESTS_COLLECTED) or len(loop.verdicts) != len(chosen):
        return 1
    entries = [
        {"kind": mutant.kind, "mutant": str(mutant), "name": mutant.name, "outcome": verdict.outcome, "by": verdict.by}
        for mutant in chosen
        if (verdict := loop.verdicts[mutant.number])
    ]
    if arguments.output:
        arguments.output.write_text(json.dumps(entries, indent=1) + "\n")
    counts = Counter(entry["outcome"] for entry in entries)
    survivors = len(entries) - counts["killed"] - counts["explained"]
    print(f"{len(entries)} mutants: " + ", ".join(f"{count} {outcome}" for outcome, count in counts.most_common()))
    return min(1, survivors)


if __name__ == "__main__":
    sys.exit(main())
