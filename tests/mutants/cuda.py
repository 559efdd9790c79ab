"""Mutants of the CUDA kernels, run by the emulator: all that schemata.py finds, and those of cuda_added.py.

python -m tests.mutants.cuda, with the options of runner.py.
"""

import os
import sys
from pathlib import Path

from tests.mutants import sources
from tests.mutants.cuda_added import ADDED
from tests.mutants.cuda_explained import EXPLAINED
from tests.mutants.runner import Suite, run
from tests.mutants.schemata import Mutant
from tests.support import emulator

FOLDER = emulator.ROOT / "build" / "mutants" / "cuda"
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
        "costs",
    )
]


def changed_sources() -> tuple[dict[Path, str], list[Mutant]]:
    def has_mutants(file: Path) -> bool:
        return file.parts[0] == "cuda" and file.suffix == ".h" and "ptx" not in file.parts

    return sources.changed_sources(has_mutants, ADDED)


def main() -> int:
    texts, mutants = changed_sources()
    sources.write_sources(FOLDER / "csrc", texts, mutants)
    library = emulator.build(FOLDER / "built", FOLDER / "csrc", more=[FOLDER / "csrc" / "lak_mutant.cpp"])
    os.environ |= {"LAK_EMULATOR": str(library), "OMP_NUM_THREADS": "1"}
    emulator.load_emulator()
    return run(Suite(library, mutants, TESTS, EXPLAINED, FOLDER), sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
