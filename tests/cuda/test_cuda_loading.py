"""The CUDA library in a process as torch makes it: what it finds of torch's CUDA half, and what it says where there is none.

torch opens its libraries for itself alone (RTLD_LOCAL), and the CUDA library needs libtorch_cpu.so only, so that it loads
beside any torch. Stand-ins with that graph of dependencies are compiled here and loaded in processes of their own;
`make test-cuda-torch` does the same with a real CUDA build of torch.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from llama_adapter_kernels.ops import cuda_library
from tests.support.emulator import ROOT

STAND_INS = {
    # name: (source, libraries it needs)
    "libtorch_cpu.so": ('extern "C" int torch_stand_in_cpu() { return 1; }', ()),
    "libtorch_cuda.so": (
        '#include <cstdint>\nextern "C" int32_t aoti_torch_get_current_cuda_stream(int32_t device, void** stream) {\n'
        "  *stream = reinterpret_cast<void*>(static_cast<intptr_t>(4096 + device));\n  return 0;\n}",
        ("libtorch_cpu.so",),
    ),
    "libtorch_python.so": (
        'extern "C" int torch_stand_in_python() { return 1; }',
        ("libtorch_cuda.so", "libtorch_cpu.so"),
    ),
}

# Prints the sentence (or None) before and after torch's libraries are there, and device 3's stream.
CHILD = """
import ctypes, sys
cpu, torch, ours, real_torch = sys.argv[1:]
if real_torch == "yes":
    import torch as _
else:
    ctypes.CDLL(cpu)
library = ctypes.CDLL(ours)
library.lak_cuda_torch_problem.restype = ctypes.c_char_p
stream = ctypes.c_void_p()
print(library.lak_cuda_torch_problem())
print(library.lak_cuda_current_stream(3, ctypes.byref(stream)))
ctypes.CDLL(torch)  # RTLD_LOCAL, as Python imports torch._C
print(hasattr(ctypes.CDLL(None), "aoti_torch_get_current_cuda_stream"))
print(library.lak_cuda_torch_problem())
print(library.lak_cuda_current_stream(3, ctypes.byref(stream)), stream.value)
"""


def compile_library(
    folder: Path, name: str, source: Path, needs: tuple[str, ...] = (), flags: tuple[str, ...] = ()
) -> Path:
    command = ["g++", "-std=c++20", "-shared", "-fPIC", "-Wl,--no-as-needed", *flags, str(source), "-o", str(folder / name),
               f"-Wl,-soname,{name}", f"-L{folder}", f"-Wl,-rpath,{folder}", *(f"-l:{need}" for need in needs)]  # fmt: skip
    subprocess.run(command, check=True)
    return folder / name


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stand_ins")
    for name, (text, needs) in STAND_INS.items():
        source = folder / f"{name}.cpp"
        source.write_text(text + "\n")
        compile_library(folder, name, source, needs)
    csrc = ROOT / "csrc"
    compile_library(folder, "libours.so", csrc / "cuda" / "current_stream.cpp", ("libtorch_cpu.so",),
                    (f"-I{csrc}", f"-I{csrc / 'cuda'}", "-fvisibility=hidden"))  # fmt: skip
    return folder


def said_by_child(*arguments: object) -> list[str]:
    child = subprocess.run([sys.executable, "-c", CHILD, *map(str, arguments)], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    return child.stdout.splitlines()


def check(lines: list[str]) -> None:
    before, refused, exported, after, stream = lines
    assert "this process has no libtorch_cuda.so" in before
    assert refused == "-1"
    assert exported == "False"  # the case that a plain or weak reference cannot see
    assert after == "None"
    assert stream == "0 4099"


def test_the_stream_is_found_in_a_library_that_torch_opened_for_itself(stand_ins: Path) -> None:
    check(
        said_by_child(stand_ins / "libtorch_cpu.so", stand_ins / "libtorch_python.so", stand_ins / "libours.so", "no")
    )


@pytest.mark.skipif(not cuda_library.LIBRARY.exists(), reason="the CUDA library is not built: no nvcc, or LAK_CUDA=0")
def test_the_built_library_finds_it_beside_the_installed_torch(stand_ins: Path) -> None:
    """The library as built, beside the real libtorch_cpu.so; only libtorch_cuda.so is a stand-in."""
    import torch

    if torch.version.cuda is not None:
        pytest.skip("this torch has CUDA: make test-cuda-torch checks the real binding")
    check(said_by_child("", stand_ins / "libtorch_cuda.so", cuda_library.LIBRARY, "yes"))
