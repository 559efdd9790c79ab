"""Builds the emulator's Python module with Ninja (g++ compiles the CUDA sources as C++) and loads it."""

import fcntl
import importlib.util
import os
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pybind11
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).parents[2].resolve()
HERE = ROOT / "tests" / "emulator"
# In assembly: g++'s fill of 8, 4, 2 bytes and of whole vectors, and the same with all bits set, which are NaN in every type.
REGISTERS_OF_NOBODY = {
    "-72340172838076674": "-1",
    "-16843010": "-1",
    "0xfefefefe": "0xffffffff",
    "[$$]-258,": "$$-1,",
    "[.]byte\\t-2$$": ".byte\\t-1",
}


def build(folder: Path, csrc: Path = ROOT / "csrc", more: Sequence[Path] = ()) -> Path:
    """Builds (what changed of) the module in `folder` and returns its path.

    `csrc`: where the sources of the kernels are; `more`: C++ that is compiled along.

    Raises:
        RuntimeError: with the compiler's output.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # The ops on CUDA tensors are in the module, too, under a name of their own and for tensors of the CPU.
    ops = [csrc / "cuda/op_cuda.cpp", csrc / "op/schema.cpp", HERE / "torch_stand_in.cpp"]
    sources = [*HERE.glob("*.cpp"), *HERE.glob("*.cu"), *(csrc / "cuda").glob("*.cu"),
               *(csrc / "cuda/sm80").rglob("*.cu"), *ops[:2], *more]  # fmt: skip
    schemas = (ROOT / "llama_adapter_kernels/ops/schemas.txt").read_text()
    text = (csrc / "op/schemas_text.h.in").read_text().replace("@LAK_SCHEMAS@", schemas)
    write_if_changed(folder / "generated" / "op" / "schemas_text.h", text)
    torch_flags = (
        " ".join(f"-isystem {path}" for path in (*include_paths(), folder / "generated"))
        + " -DTORCH_TARGET_VERSION=0x020b000000000000ULL -DLAK_LIBRARY=llama_adapter_kernels_emulated -DLAK_DISPATCH_KEY=CPU"
    )
    torch_library = Path(include_paths()[0]).parent / "lib"
    includes = [HERE / "include", HERE, csrc / "cuda", csrc]
    system = [pybind11.get_include(), sysconfig.get_path("include")]
    flags = " ".join([*(f"-I{path}" for path in includes), *(f"-isystem {path}" for path in system)])
    module = folder / f"cuda_emulator{sysconfig.get_config_var('EXT_SUFFIX')}"
    # -O1: half the compile time of -O2, and most of the run time is spent in machine.cpp and the matrix product.
    # Registers that nobody wrote hold NaN in every 16 or 32 bits, so that nothing made of them is right by luck, not even
    # times zero: g++ fills them with a pattern that is a number, in instructions that are easy to find.
    fill = " ".join(f"-e 's/{old}/{new}/'" for old, new in REGISTERS_OF_NOBODY.items())
    lines = [
        "flags = -std=c++20 -O1 -ftrivial-auto-var-init=pattern -fPIC -fvisibility=hidden -Wno-unknown-pragmas "
        f"-DLAK_CUDA_ARCHITECTURES='\"emulated\"' {flags}",
        "rule compile",
        "  command = g++ $flags $extra -MD -MF $out.d -x c++ -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule compile_kernels",
        "  command = g++ $flags -MD -MF $out.d -MT $out -x c++ -S $in -o $out.s "
        f"&& sed -i {fill} $out.s && g++ -c $out.s -o $out && rm $out.s",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = g++ -shared $in -o $out -L{torch_library} -l:libtorch_cpu.so",
    ]
    objects = []
    for source in sorted(sources):
        objects.append(f"{source.name}.o")
        lines.append(f"build {objects[-1]}: {'compile' if source.suffix == '.cpp' else 'compile_kernels'} {source}")
        if source.suffix == ".cpp":
            lines.append(f"  extra = {f'-O1 {torch_flags}' if source in ops else '-O2'}")
    lines.append(f"build {module.name}: link {' '.join(objects)}")
    (folder / "build.ninja").write_text("\n".join(lines) + "\n")
    result = subprocess.run(["ninja", "-C", str(folder), "-j", "2"], capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(result.stdout + result.stderr)
    return module


def write_if_changed(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def load_emulator() -> ModuleType:
    """Builds what changed (a worker waits for the other's build) and imports the module; mutants give theirs."""
    folder = ROOT / "build" / "emulator"
    if built := os.environ.get("LAK_EMULATOR"):
        path = Path(built)
    else:
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
