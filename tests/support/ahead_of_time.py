"""Compiles the kernels as the launchers would launch them, for a card that is not here, and reads the machine code.

The launchers run unchanged on CPU tensors; only Triton's driver is replaced by one that names a card, and a launch by
the compilation before it. So what is checked has the very arguments, alignments and tiles of a real launch.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from llama_adapter_kernels.triton_kernels import backward_launcher, launchers, tuning
from tests.support.machine_code import addresses, in_loops

CARDS = {"sm80": (8, 0), "sm86": (8, 6), "sm90": (9, 0), "sm100": (10, 0)}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Report:
    """What ptxas made of one kernel."""

    kernel: str
    tile: tuple[int, ...]
    warps: int
    registers: int
    stack: int  # bytes of local memory per thread
    spills: int  # instructions that load from or store to local memory
    spills_in_loops: int  # those of them that are executed again and again
    shared: int  # bytes
    instructions: dict[str, int]  # of the kinds named in `KINDS`
    pending: tuple[int, ...]  # how many groups of wgmma each wait leaves in flight


# Matrix instructions of the three generations, 16-byte asynchronous copies, copies by descriptor, loads, special functions.
KINDS = {
    "HMMA": r"\bHMMA\.", "HGMMA": r"\bHGMMA\.", "UTCHMMA": r"\bUTC\w*MMA", "LDGSTS": r"\bLDGSTS\.\S*128",
    "UTMALDG": r"\bUTMALDG\.", "LDG128": r"\bLDG\.\S*128", "LDG": r"\bLDG\.", "MUFU.EX2": r"\bMUFU\.EX2", "FFMA": r"\bFFMA",
    "all": r"^\s+/\*[0-9a-f]{4,}\*/\s",
}  # fmt: skip


class _NamedCard:
    """The part of a Triton driver that compiling needs."""

    def __init__(self, card: str) -> None:
        self.target = GPUTarget("cuda", CARDS[card][0] * 10 + CARDS[card][1], 32)
        self.number = list(CARDS).index(card)  # kernels are cached by device: every card is one of its own

    def get_current_device(self) -> int:
        return self.number

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


def _disassemble(cubin: bytes) -> tuple[str, str]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run([TOOLS / "cuobjdump", option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    return usage, code


def report(compiled: Any, constants: dict[str, Any]) -> Report:
    usage, code = _disassemble(compiled.asm["cubin"])
    spills = addresses(code, r"\b(?:LDL|STL)\b")
    repeated = in_loops(code)
    numbers = {name: int(re.search(rf"\b{name}:(\d+)", usage)[1]) for name in ("REG", "STACK")}  # type: ignore[index]
    return Report(
        kernel=compiled.metadata.name,
        tile=tuple(
            v for k, v in constants.items() if k.startswith(("BLOCK_", "KEYS_", "QUERIES_")) and k not in ("BLOCK_D",)
        ),
        warps=compiled.metadata.num_warps,
        registers=numbers["REG"],
        stack=numbers["STACK"],
        spills=len(spills),
        spills_in_loops=sum(spill in repeated for spill in spills),
        shared=compiled.metadata.shared,
        pending=tuple(sorted(map(int, re.findall(r"wgmma\.wait_group\.sync\.aligned (\d+)", compiled.asm["ptx"])))),
        instructions={kind: len(re.findall(pattern, code, re.MULTILINE)) for kind, pattern in KINDS.items()},
    )


def compile_for(
    card: str, dtype: torch.dtype, head_dim: int, pass_name: str, prefix_length: int = 10, is_causal: bool = True,
    **options: Any,
) -> list[Report]:  # fmt: skip
    """Compiles one pass ("forward", "backward" or "decode") in the layout transformers use; one report per kernel.

    options: `mask` "bool" or "float", `varlen`, `window`: which optional arguments are there.
    """
    driver.set_active(_NamedCard(card))
    tuning.capability = lambda device: CARDS[card]  # type: ignore[assignment]
    tuning.processors = lambda device: 132  # type: ignore[assignment]
    found: list[Report] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        found.append(report(compiled, kwargs))

    JITFunction.run = compile_only
    try:
        _launch(dtype, head_dim, pass_name, prefix_length, is_causal, **options)
    finally:
        JITFunction.run = run
    return found


def _launch(
    dtype: torch.dtype, head_dim: int, pass_name: str, prefix_length: int, is_causal: bool, mask: str | None = None,
    varlen: bool = False, window: bool = False,
) -> None:  # fmt: skip
    batch, heads, heads_kv, seq = 2, 4, 2, 1024

    def rows(heads: int, length: int = seq) -> torch.Tensor:
        if varlen:
            return torch.empty(batch * length, heads, head_dim, dtype=dtype)
        return torch.empty(batch, length, heads, head_dim, dtype=dtype).transpose(1, 2)

    query, key, value = rows(heads), rows(heads_kv), rows(heads_kv)
    prefix_key, prefix_value = (torch.empty(1, heads_kv, prefix_length, head_dim, dtype=dtype) for _ in range(2))
    gate = torch.empty(1, heads)
    attn_mask = None
    if mask is not None:
        attn_mask = torch.empty(batch, 1, seq, seq, dtype=torch.bool if mask == "bool" else dtype)
        attn_mask = attn_mask.expand(batch, heads, seq, seq)
    lengths = torch.zeros(batch, dtype=torch.int32) if window else None
    offsets = torch.zeros(batch + 1, dtype=torch.int32) if varlen else None
    inputs = (query, key, value, prefix_key, prefix_value, gate)
    optional = (attn_mask, lengths, lengths, None, offsets, offsets, seq, seq, 0.125, is_causal)
    if pass_name == "forward":
        launchers.forward(*inputs, *optional)
    elif pass_name == "backward":
        logsumexp = torch.empty((heads, batch * seq) if varlen else (batch, heads, seq))
        backward_launcher.backward(query, *inputs, query, logsumexp, *optional, True, True, True, True)
    else:
        query = rows(heads, 1)
        launchers.decode(query, *inputs[1:], lengths, lengths, None, 0.125, is_causal)


def narrow_tile_offsets(card: str, dtype: torch.dtype, head_dim: int) -> list[str]:
    """Additions of a 32-bit offset to the pointers of a two-dimensional tile, as the compiler sees them."""
    found: list[str] = []
    plain_report = globals()["report"]

    def inspect(compiled: Any, constants: dict[str, Any]) -> Report | None:
        additions = re.findall(r"tt\.addptr .*", compiled.asm["ttir"])
        found.extend(line for line in additions if re.search(r"tensor<\d+x\d+xi32>", line))
        return None

    globals()["report"] = inspect
    try:
        for pass_name in ("forward", "backward"):
            compile_for(card, dtype, head_dim, pass_name)
    finally:
        globals()["report"] = plain_report
    return found
