"""Which of cuda and triton runs a problem on a GPU where both can: what was faster in recorded races, else what is argued.

The record is order.json beside this file, written by `llama-adapter bench --device cuda --record-order`. Its entries hold
for one compute capability, pass, dtype and head_dim (up to 64, 128 or 256).

The argument, where no race is recorded:

- Compute capability 9.x and 10.x, 16-bit forward and backward: triton. Its compiler makes wgmma (9.x) and tcgen05 (10.x)
  of the same products. The CUDA kernels are mma.sync, which reaches about 60% of the tensor cores' rate on an H100, and
  less on later cards.
- 8.x and 12.x: cuda. There mma.sync is all there is; the CUDA kernels keep 32 rows a warp, use each fragment of K and V
  twice, and take dK, dV and dQ from one pass over the scores (five products), where Triton's take two (seven).
- decode and float32: cuda. Decode is bound by memory and launches; float32 has no matrix instructions on either side.
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch

from llama_adapter_kernels.ops import record_file

Pass = Literal["forward", "backward", "decode"]  # backward: forward and backward, a training step
PASSES: tuple[Pass, ...] = ("forward", "backward", "decode")
GPU_BACKENDS = ("cuda", "triton")
# What torch.cuda raises where there is no driver, no device, a fork or a broken context: its C part RuntimeError, its
# Python part AssertionError, and for calls that waited for the first use of a device an exception of its own.
CUDA_ERRORS = (RuntimeError, AssertionError, torch.cuda.DeferredCudaCallError)
RECORD = Path(__file__).parent / "order.json"
FORMAT, VERSION = "llama-adapter-kernels backend order", 1


@dataclass(frozen=True)
class Entry:
    """What races on one card say."""

    capability: str  # "9.0"
    pass_name: str
    dtype: str  # "bfloat16"
    head_dim: int  # 64, 128 or 256: up to
    faster: str  # "cuda" or "triton"
    ratio: float  # the other's time over the faster one's, geometric mean over the races
    races: int
    card: str
    recorded: str

    @property
    def key(self) -> tuple[str, str, str, int]:
        return self.capability, self.pass_name, self.dtype, self.head_dim


def load(path: Path) -> dict[tuple[str, str, str, int], Entry]:
    """The recorded entries by their key; none where there is no file.

    Raises:
        RecordError: the file is not a record of this version.
    """
    entries = record_file.load(path, FORMAT, VERSION, Entry)
    for entry in entries:
        if entry.faster not in GPU_BACKENDS or entry.pass_name not in PASSES:
            raise record_file.RecordError(
                f"{path}: expected a backend and a pass, got {entry.faster!r} and {entry.pass_name!r}"
            )
    return {entry.key: entry for entry in entries}


def save(entries: dict[tuple[str, str, str, int], Entry], path: Path) -> None:
    """Writes the record whole, one entry a line."""
    record_file.save(path, FORMAT, VERSION, (entries[key] for key in sorted(entries)))


def head_dim_class(head_dim: int) -> int:
    """The padded head size: one set of kernels and tiles serves all sizes up to it."""
    return 64 if head_dim <= 64 else 128 if head_dim <= 128 else 256


def argued(capability: tuple[int, int], pass_name: Pass, dtype: torch.dtype) -> tuple[str, ...]:
    """The order without a race, see above."""
    half = dtype in (torch.bfloat16, torch.float16)
    return ("triton", "cuda") if capability[0] in (9, 10) and half and pass_name != "decode" else GPU_BACKENDS


def backends_for(capability: tuple[int, int], pass_name: Pass, dtype: torch.dtype, head_dim: int) -> tuple[str, ...]:
    """cuda and triton, the one to be tried first first."""
    key = (f"{capability[0]}.{capability[1]}", pass_name, str(dtype).removeprefix("torch."), head_dim_class(head_dim))
    entry = _recorded().get(key)
    if entry is None:
        return argued(capability, pass_name, dtype)
    return (entry.faster, *(name for name in GPU_BACKENDS if name != entry.faster))


def candidates(device: torch.device, pass_name: Pass, dtype: torch.dtype, head_dim: int) -> tuple[str, ...]:
    """The backends to try for tensors on `device`, best first, whether or not they are available."""
    if device.type != "cuda":
        return ("cpu", *GPU_BACKENDS)
    # The class of head_dim is decided outside of the constant, where torch.compile may have a symbol for head_dim.
    return ("cpu", *_on_this_card(device, pass_name, dtype, head_dim_class(head_dim)))


@torch.compiler.assume_constant_result
def _on_this_card(device: torch.device, pass_name: Pass, dtype: torch.dtype, head_dim: int) -> tuple[str, ...]:
    return _for_device(device, pass_name, dtype, head_dim)


@lru_cache(maxsize=256)
def _for_device(device: torch.device, pass_name: Pass, dtype: torch.dtype, head_dim: int) -> tuple[str, ...]:
    try:
        capability = torch.cuda.get_device_capability(device)
    except CUDA_ERRORS:  # neither backend is available, and the order does not matter
        return GPU_BACKENDS
    return backends_for(capability, pass_name, dtype, head_dim)


@lru_cache(maxsize=1)
def _recorded() -> dict[tuple[str, str, str, int], Entry]:
    return load(RECORD)


def forget() -> None:
    """Reads the record again."""
    _recorded.cache_clear()
    _for_device.cache_clear()
