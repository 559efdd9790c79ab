"""Mutants of the CPU kernels, compiled for AVX2 alone: all that schemata.py finds, and those of cpu_added.py.

python -m tests.mutants.cpu, with the options of runner.py. The library's other objects are those of build/cmake, which an
installation leaves there.
"""

import importlib.util
import json
import os
import pickle
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from tests.mutants import sources
from tests.mutants.cpu_added import ADDED
from tests.mutants.cpu_explained import EXPLAINED
from tests.mutants.runner import Suite, run
from tests.mutants.schemata import Mutant
from tests.support.emulator import ROOT

FOLDER = ROOT / "build" / "mutants" / "cpu"
FILES = (
    "backward.cpp",
    "decode.cpp",
    "forward.cpp",
    "problem.h",
    "products.h",
    "scores.h",
    "simd.h",
    "storage.h",
    "tiles.h",
)
TESTS = [
    *(f"tests/cpu/test_{name}.py" for name in ("attention_cpu", "few_keys", "scales", "special_values")),
    "tests/ops/test_invariants.py", "-k", "avx2 or (not baseline and not avx512 and not amx and not cuda and not triton)",
]  # fmt: skip
SITE = "LAK_MUTANTS_SITE"  # in the environment of the process that runs the tests: the folder whose library has the mutants


def changed_sources() -> tuple[dict[Path, str], list[Mutant]]:
    return sources.changed_sources(lambda file: file.parts[0] == "cpu" and file.name in FILES, ADDED)


def build(folder: Path, library: Path) -> None:
    """Compiles the AVX2 kernels of the changed sources, without optimisation that takes long, and links."""
    database = ROOT / "build" / "cmake" / "compile_commands.json"
    if not database.exists():
        raise FileNotFoundError(f"{database}: expected the build of an installation, got none; run `make install`")
    objects = [str(folder / "lak_mutant.o")]
    subprocess.run(["c++", "-fPIC", "-c", str(folder / "csrc" / "lak_mutant.cpp"), "-o", objects[0]], check=True)
    running = []
    for entry in json.loads(database.read_text()):
        if "/cuda/" in entry["file"]:
            continue
        path = ROOT / "build" / "cmake" / entry["output"]
        if "cpu_avx2.dir" in entry["output"]:
            path = folder / path.name
            arguments = [a.replace(str(ROOT / "csrc"), str(folder / "csrc")) for a in shlex.split(entry["command"])]
            arguments[arguments.index("-o") + 1] = str(path)
            running.append(subprocess.Popen([*arguments, f"-I{folder / 'csrc'}", "-O1", "-w"]))
        objects.append(str(path))
    if any(process.wait() != 0 for process in running):
        raise RuntimeError("the mutants do not compile")
    # torch's own libraries are local to it: this one has to say that it needs them.
    torch = Path(importlib.util.find_spec("torch").origin).parent / "lib"  # type: ignore[union-attr, arg-type]
    subprocess.run(["c++", "-shared", "-o", str(library), *objects, f"-L{torch}", "-ltorch_cpu"], check=True)


def make_site(site: Path) -> None:
    """A folder with the package and its tests. pytest puts the folder of its configuration first, so both are needed."""
    shutil.rmtree(site, ignore_errors=True)
    for folder in ("llama_adapter_kernels", "tests"):
        shutil.copytree(ROOT / folder, site / folder, ignore=shutil.ignore_patterns("__pycache__", "*_cuda.so"))
    shutil.copy(ROOT / "pyproject.toml", site)


def main() -> int:
    if site := os.environ.get(SITE):
        library = Path(site) / "llama_adapter_kernels" / "libllama_adapter_kernels.so"
        mutants = pickle.loads((Path(site) / "mutants.pickle").read_bytes())
        import torch

        torch.set_num_threads(1)
        return run(Suite(library, mutants, TESTS, EXPLAINED, Path(site).parent), sys.argv[1:])
    texts, mutants = changed_sources()
    sources.write_sources(FOLDER / "csrc", texts, mutants)
    make_site(FOLDER / "site")
    (FOLDER / "site" / "mutants.pickle").write_bytes(pickle.dumps(mutants))
    build(FOLDER, FOLDER / "site" / "llama_adapter_kernels" / "libllama_adapter_kernels.so")
    # Tests that name no instruction set shall run these kernels, too, on processors that have better ones.
    environment = os.environ | {SITE: str(FOLDER / "site"), "LAK_CPU_ISA": "avx2", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.mutants.cpu", *sys.argv[1:]]
    return subprocess.run(command, cwd=FOLDER / "site", env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
