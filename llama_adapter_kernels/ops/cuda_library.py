"""What the CUDA library holds: its architectures and kernels, read without a GPU.

Tiles, threads and shared memory come from the library itself (`lak_cuda_kernels` of csrc/cuda/interface.h), registers and
local memory from the machine code, by the cuobjdump that the Triton package carries.
"""

import ctypes
import re
import subprocess
from dataclasses import dataclass
from functools import lru_cache
from importlib import util
from pathlib import Path

LIBRARY = Path(__file__).parent.parent / "libllama_adapter_kernels_cuda.so"

# Kernel names of the sources by the names of `lak_cuda_kernels`, with what follows head_dim among their template arguments,
# as it is mangled.
_FUNCTIONS = {
    "forward": ("forward_kernel", "LNS0_11ForwardKindE0E"),
    "forward_small": ("forward_kernel", "LNS0_11ForwardKindE1E"),
    "forward_masked": ("forward_kernel", "LNS0_11ForwardKindE2E"),
    "backward_rows": ("backward_rows_kernel", ""),
    "backward_words": ("backward_words_kernel", ""),
    "backward_keys": ("backward_keys_kernel", "Li8E"),
    "backward_keys_small": ("backward_keys_kernel", "Li4E"),
    "decode": ("decode_kernel", ""),
}
_TYPES = {"bfloat16": "NS_8BFloat16E", "float16": "NS_7Float16E", "float32": "f"}


@dataclass(frozen=True)
class Kernel:
    """One kernel as it was designed."""

    family: str  # of architectures: "sm80" (compute capability 8.0 and later)
    name: str
    dtype: str
    head_dim: int  # padded
    rows: int  # queries of a tile
    keys: int  # keys (prefix kernels: slots) of a tile
    threads: int  # of a block
    blocks: int  # that one multiprocessor is meant to hold at the same time
    shared: int  # dynamic shared memory of a block, bytes

    @property
    def symbol(self) -> str:
        """The mangled name up to the parameters."""
        function, arguments = _FUNCTIONS[self.name]
        scope = f"_ZN3lak{len(self.family)}{self.family}{len(function)}{function}"
        return f"{scope}I{_TYPES[self.dtype]}Li{self.head_dim}E{arguments}EEv"


@dataclass(frozen=True)
class Usage:
    """What one kernel became for one architecture."""

    registers: int  # of a thread
    stack: int  # local memory of a thread, bytes: spills and arrays


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(LIBRARY))
    for function in ("lak_cuda_kernels", "lak_cuda_architectures", "lak_cuda_error", "lak_cuda_torch_problem",
                     "lak_cuda_driver_needed"):  # fmt: skip
        getattr(library, function).restype = ctypes.c_char_p
    return library


def torch_problem() -> str | None:
    """Why the library cannot ask torch for its current stream; None when it can."""
    problem: bytes | None = _library().lak_cuda_torch_problem()
    return None if problem is None else problem.decode()


def probe() -> tuple[str | None, bool]:
    """(why the kernels cannot run on the current CUDA device, None when they can; whether that may change)."""
    can_change = ctypes.c_int(0)
    code = _library().lak_cuda_probe(ctypes.byref(can_change))
    return None if code == 0 else _library().lak_cuda_error(code).decode(), bool(can_change.value)


def choose_forward_keys(capability: tuple[int, int], keys: int) -> None:
    """Forward tiles of 64 or 32 keys on devices of one compute capability; 0: the library's default.

    Raises:
        ValueError: no such tile or no such device.
    """
    code = _library().lak_cuda_choose_forward_keys(10 * capability[0] + capability[1], keys)
    if code != 0:
        raise ValueError(_library().lak_cuda_error(code).decode())


def architectures() -> list[str]:
    """The architectures with code of their own, such as "sm_80"."""
    return [f"sm_{number}" for number in _library().lak_cuda_architectures().decode().split()]


def kernels() -> list[Kernel]:
    """Every kernel with a matrix product in it; sums and conversions are left out."""
    lines = _library().lak_cuda_kernels().decode().splitlines()
    return [Kernel(family, name, dtype, *map(int, numbers)) for family, name, dtype, *numbers in map(str.split, lines)]


def cuobjdump() -> Path | None:
    """The tool of the Triton package; None where Triton is not installed."""
    spec = util.find_spec("triton")
    if spec is None or spec.origin is None:
        return None
    tool = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return tool if tool.exists() else None


def usage() -> dict[str, dict[str, Usage]]:
    """By architecture and mangled name; empty without cuobjdump."""
    tool = cuobjdump()
    if tool is None:
        return {}
    text = subprocess.run([tool, "-res-usage", LIBRARY], capture_output=True, text=True, check=True).stdout
    found: dict[str, dict[str, Usage]] = {}
    for part in text.split("Fatbin elf code:")[1:]:
        architecture = re.search(r"arch = (\w+)", part)
        for name, registers, stack in re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+)", part):
            assert architecture is not None
            found.setdefault(architecture[1], {})[name] = Usage(int(registers), int(stack))
    return found


def usage_of(kernel: Kernel, functions: dict[str, Usage]) -> Usage:
    """The entry of `kernel` among the functions of one architecture."""
    (found,) = (usage for name, usage in functions.items() if name.startswith(kernel.symbol))
    return found


def summary() -> str:
    """One line: what is built and what it needs."""
    if not LIBRARY.exists():
        return "CUDA library: not built (no nvcc at installation, or LAK_CUDA=0)"
    driver = _library().lak_cuda_driver_needed().decode()
    return f"CUDA library: {', '.join(architectures())}, and PTX for later cards; {len(kernels())} kernels; {driver}"


def kernel_table() -> list[str]:
    """A table for people, one line per kernel."""
    if not LIBRARY.exists():
        return []
    built, compiled = architectures(), usage()
    lines = [
        f"  {'kernel':<24}{'type':<10}{'head_dim':>8}  {'tile':<8}{'threads':>7}{'KiB':>6}  registers ({', '.join(built)})"
    ]
    for kernel in kernels():
        found = [usage_of(kernel, compiled[architecture]) for architecture in built if compiled]
        registers = " ".join(f"{u.registers}{'*' if u.stack else ''}" for u in found) or "-"
        tile = f"{kernel.rows}x{kernel.keys}"
        lines.append(
            f"  {kernel.name:<24}{kernel.dtype:<10}{kernel.head_dim:>8}  {tile:<8}{kernel.threads:>7}"
            f"{kernel.shared / 1024:>6.1f}  {registers}"
        )
    return [
        *lines,
        "  *: with local memory" if compiled else "  -: known where Triton is installed, which brings cuobjdump",
    ]
