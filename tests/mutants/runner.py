"""Tries every mutant of a library with the tests that reach it.

    --only rows.h:100-140   of one file, and there of these lines alone
    --kinds barrier,wait    of these kinds alone: barrier wait commit zero comparison mask condition choice clip sign factor,
                            and added
    --seconds 60            of a core for one mutant; tests that do not fit are left out, which the verdict says
    --first long,table      tests with one of these in their names come before others
    --output FILE           verdicts as JSON
    --again FILE            of an earlier output what was not killed, alone
    --explained             those that are explained, alone: a test that kills one proves its explanation wrong

Each test runs once without a fault, to see which mutants it reaches and how long it takes; each mutant is tried by the tests
that reach it, in a process of its own, until one of them fails. A survivor wants a test, or the line can go, or there is an
explanation why it changes nothing that a result or a count could show.
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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.mutants.schemata import Mutant


@dataclass(frozen=True)
class Suite:
    library: Path  # with all the mutants
    mutants: Sequence[Mutant]
    tests: Sequence[str]  # arguments of pytest
    explained: Mapping[str, str]  # by Mutant.name
    folder: Path  # for what is remembered


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

    def __init__(self, suite: Suite, chosen: list[Mutant], options: argparse.Namespace) -> None:
        self.suite, self.chosen = suite, chosen
        self.seconds, self.jobs = options.seconds, options.jobs
        self.first = options.first.split(",") if options.first else []
        self.try_explained = options.explained
        self.runs: list[Run] = []
        self.verdicts: dict[int, Verdict] = {}
        self.kills: Counter[int] = Counter()

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        loaded = ctypes.CDLL(str(self.suite.library))
        self.active = ctypes.c_int.in_dll(loaded, "lak_active_mutant")
        self.reached = (ctypes.c_ubyte * len(self.suite.mutants)).in_dll(loaded, "lak_reached")
        self.items = session.items
        tests = sorted({item.path for item in self.items})
        read = [path.read_bytes() for path in (self.suite.library, *tests)]
        key = hashlib.sha256(b"".join(read) + "".join(item.nodeid for item in self.items).encode()).hexdigest()
        known = self.suite.folder / "runs.pickle"  # of the same kernels and tests
        if known.exists() and (stored := pickle.loads(known.read_bytes()))[0] == key:
            self.runs = stored[1]
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
                ctypes.memset(self.reached, 0, len(self.suite.mutants))
                begin = time.process_time()
                if not self._passes(at):
                    raise RuntimeError(f"{self.items[at].nodeid} fails without a fault")
                result.append((at, Run(time.process_time() - begin, bytes(self.reached))))
            return result

        files = []
        for job in range(self.jobs):
            files.append(self.suite.folder / f"runs-{job}.pickle")
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
                if mutant.name in self.suite.explained and not self.try_explained:
                    self._note(mutant, Verdict("explained", self.suite.explained[mutant.name]))
                    continue
                if not order:
                    self._note(mutant, Verdict("not reached"))
                    continue
                file = self.suite.folder / f"verdict-{mutant.number}"
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
        """Those that reach it: first what is quick, has told much so far, and is not the same function again."""
        able = [at for at, run in enumerate(self.runs) if run.reached[mutant.number]]
        of_function: Counter[str] = Counter()
        cost = {}
        for at in sorted(able, key=lambda at: self.runs[at].seconds):
            function = self.items[at].nodeid.split("[")[0]
            of_function[function] += 1
            first = any(name in self.items[at].nodeid for name in self.first)
            cost[at] = (not first, self.runs[at].seconds * of_function[function] ** 0.5 / (1 + self.kills[at]))
        return sorted(able, key=cost.__getitem__)

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


def choose(mutants: Sequence[Mutant], only: str, kinds: str) -> list[Mutant]:
    file, _, lines = only.partition(":")
    first, _, last = lines.partition("-")
    return [
        mutant
        for mutant in mutants
        if (not file or mutant.file.endswith(file))
        and (not lines or int(first) <= mutant.line <= int(last or first))
        and (not kinds or mutant.kind in kinds.split(","))
    ]


def run(suite: Suite, arguments: Sequence[str]) -> int:
    """The exit status: 1 where a mutant survived that nobody has explained, or where an explanation is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="")
    parser.add_argument("--kinds", default="")
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--first", default="")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--again", type=Path)
    parser.add_argument("--explained", action="store_true")
    options = parser.parse_args(arguments)
    chosen = choose(suite.mutants, options.only, options.kinds)
    if options.again:
        alive = {entry["name"] for entry in json.loads(options.again.read_text()) if entry["outcome"] != "killed"}
        chosen = [mutant for mutant in chosen if mutant.name in alive]
    if options.explained:
        chosen = [mutant for mutant in chosen if mutant.name in suite.explained]
    loop = Loop(suite, chosen, options)
    code = pytest.main([*suite.tests, "-q", "-p", "no:cacheprovider", "-p", "no:xdist"], plugins=[loop])
    if code not in (0, pytest.ExitCode.NO_TESTS_COLLECTED) or len(loop.verdicts) != len(chosen):
        return 1
    entries = [
        {"kind": mutant.kind, "mutant": str(mutant), "name": mutant.name, "outcome": verdict.outcome, "by": verdict.by}
        for mutant in chosen
        if (verdict := loop.verdicts[mutant.number])
    ]
    if options.output:
        options.output.write_text(json.dumps(entries, indent=1) + "\n")
    counts = Counter(entry["outcome"] for entry in entries)
    print(f"{len(entries)} mutants: " + ", ".join(f"{count} {outcome}" for outcome, count in counts.most_common()))
    return min(1, counts["killed"] if options.explained else len(entries) - counts["killed"] - counts["explained"])
