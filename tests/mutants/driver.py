"""Puts one fault after the other into a source file, builds what it is part of, and runs the tests that should notice.

A mutant that no test notices is a survivor: either a test is missing, or the mutant says why it changes nothing
(`equivalent`). A suite says how a mutated copy of the sources is built; the driver knows nothing of compilers.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Mutant:
    """`old`, which stands in `file` exactly once, becomes `new`."""

    name: str
    file: str  # from the root of the repository
    old: str
    new: str
    tests: tuple[str, ...] = ()  # arguments of pytest; default: the suite's
    equivalent: str = ""  # why no test can notice, where none can


@dataclass(frozen=True)
class Suite:
    name: str
    mutants: Sequence[Mutant]
    sources: Sequence[str]  # folders and files that are copied, from the root
    build: Callable[[Path, Path, Mutant], None]  # (copy of the sources, site, mutant): puts a library into the site
    tests: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)  # of the tests


def make_site(site: Path) -> None:
    """A folder with the package and its tests. pytest puts the folder of its configuration first, so both are needed."""
    shutil.rmtree(site, ignore_errors=True)
    for folder in ("llama_adapter_kernels", "tests"):
        shutil.copytree(ROOT / folder, site / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", site)


def outcome(suite: Suite, mutant: Mutant, folder: Path) -> tuple[bool, str]:
    """(killed, by what)."""
    sources, site = folder / "sources", folder / "site"
    shutil.rmtree(sources, ignore_errors=True)
    for source in suite.sources:
        to = sources / source
        to.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, to)
        else:
            shutil.copy(ROOT / source, to)
    file = sources / mutant.file
    text = file.read_text()
    if text.count(mutant.old) != 1:
        raise ValueError(f"{mutant.name}: expected its text once in {mutant.file}, got {text.count(mutant.old)} times")
    file.write_text(text.replace(mutant.old, mutant.new))
    suite.build(sources, site, mutant)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist"]
    result = subprocess.run(
        [*command, *(mutant.tests or suite.tests)], cwd=site, capture_output=True, text=True,
        env=os.environ | suite.environment,
    )  # fmt: skip
    if result.returncode not in (0, 1) and result.returncode > 0:  # negative: a signal, which is a fault noticed
        raise RuntimeError(f"{mutant.name}: pytest did not run\n{result.stdout[-2000:]}{result.stderr[-2000:]}")
    failed = [line for line in result.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return result.returncode != 0, failed[0].split(" - ")[0] if failed else f"exit status {result.returncode}"


def run(suite: Suite, names: Sequence[str] = ()) -> int:
    """Runs all mutants of a suite, or those named; returns how many survived without a reason."""
    folder = ROOT / "build" / "mutants" / suite.name
    make_site(folder / "site")
    survivors = []
    for mutant in suite.mutants:
        if names and mutant.name not in names:
            continue
        if mutant.equivalent:
            print(f"explained  {mutant.name}: {mutant.equivalent}", flush=True)
            continue
        killed, by = outcome(suite, mutant, folder)
        print(f"killed     {mutant.name} by {by}" if killed else f"SURVIVED   {mutant.name}", flush=True)
        if not killed:
            survivors.append(mutant.name)
    print(f"{len(survivors)} survivors" + "".join(f" {name}" for name in survivors))
    return len(survivors)
