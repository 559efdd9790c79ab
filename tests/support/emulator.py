"""Builds the emulator's Python module with Ninja (g++ compiles the CUDA sources as C++) and loads it."""

import fcntl
import importlib.util
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import pybind11

ROOT = Path(__file__).parents[2].resolve()
HERE = ROOT / "tests" / "emulator"


def build(folder: Path) -> Path:
    """Builds (what changed of) the module in `folder` and returns its path.

    Raises:
        RuntimeError: with the compiler's output.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sources = [*HERE.glob("*.cpp"), *HERE.glob("*.cu"), *(ROOT / "csrc/cuda").glob("*.cu"),
               *(ROOT / "csrc/cuda/sm80").rglob("*.cu")]  # fmt: skip
    includes = [HERE / "include", HERE, ROOT / "csrc/cuda", ROOT / "csrc"]
    system = [pybind11.get_include(), sysconfig.get_path("include")]
    flags = " ".join([*(f"-I{path}" for path in includes), *(f"-isystem {path}" for path in system)])
    module = folder / f"cuda_emulator{sysconfig.get_config_var('EXT_SUFFIX')}"
    # -O1: half the compile time of -O2, and most of the run time is spent in machine.cpp and the matrix product.
    lines = [
        "flags = -std=c++20 -O1 -fPIC -fvisibility=hidden -Wno-unknown-pragmas "
        f"-DLAK_CUDA_ARCHITECTURES='\"emulated\"' {flags}",
        "rule compile",
        "  command = g++ $flags $extra -MD -MF $out.d -x c++ -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        "  command = g++ -shared $in -o $out",
    ]
    objects = []
    for source in sorted(sources):
        objects.append(f"{source.name}.o")
        lines.append(f"build {objects[-1]}: compile {source}")
        if source.suffix == ".cpp":
            lines.append("  extra = -O2")
    lines.append(f"build {module.name}: link {' '.join(objects)}")
    (folder / "build.ninja").write_text("\n".join(lines) + "\n")
    result = subprocess.run(["ninja", "-C", str(folder), "-j", "2"], capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(result.stdout + result.stderr)
    return module


def load_emulator() -> ModuleType:
    """Builds what changed (a worker waits for the other's build) and imports the module."""
    folder = ROOT / "build" / "emulator"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        path = build(folder)
    if "cuda_emulator" in sys.modules:
        return sys.modules["cuda_emulator"]
    spec = importlib.util.spec_from_file_location("cuda_emulator", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["cuda_emulator"] = module
    spec.loader.exec_module(module)
    return module
