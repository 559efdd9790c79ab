"""Peak memory of the loss over a large vocabulary, beside that of the head's weight and one chunk of logits.

    python benchmarks/head_memory.py --tokens 8192 --vocabulary 128000 --hidden 576 --dtype bfloat16

runs in a process of its own, as the peak of a process never goes down; exit status 1 above 1.2 times (a test calls it with
fewer tokens). On a CPU memory is what the process has in RAM; on a GPU what torch has allocated.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import nn

from llama_adapter_kernels.training import loss

ALLOWED = 1.2


def forget_peak(device: torch.device) -> int:
    """What is in use now, in bytes; from here on `peak_bytes` counts."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back (Linux)
    return _status("VmRSS")


def peak_bytes(device: torch.device) -> int:
    # Not getrusage: its peak begins with that of the process that started this one.
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")


def _status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:"))
    return 1024 * int(line.split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--vocabulary", type=int, default=128_000)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    device, dtype = torch.device(given.device), getattr(torch, given.dtype)
    head = nn.Linear(given.hidden, given.vocabulary, bias=False, dtype=dtype, device=device).requires_grad_(False)
    hidden = torch.randn(given.tokens, given.hidden, dtype=dtype, device=device, requires_grad=True)
    targets = torch.randint(given.vocabulary, (given.tokens,), device=device)
    loss.head_loss(head, hidden[:8], targets[:8]).backward()  # what libraries allocate once
    hidden.grad = None
    before = forget_peak(device)
    loss.head_loss(head, hidden, targets).backward()
    weight = head.weight.nbytes
    chunk = loss.chunk_rows(given.vocabulary, hidden) * given.vocabulary * 4
    peak = peak_bytes(device) - before + weight
    whole = 2 * given.tokens * given.vocabulary * 4  # all logits and their gradient in float32
    print(
        f"{given.tokens} tokens, vocabulary {given.vocabulary}, hidden {given.hidden}, {given.dtype}: weight and peak above "
        f"it {peak / 2**20:.1f} MiB, weight and one chunk {(weight + chunk) / 2**20:.1f} MiB, ratio "
        f"{peak / (weight + chunk):.3f}; all logits and their gradient would be {whole / 2**20:.0f} MiB"
    )
    sys.exit(peak > ALLOWED * (weight + chunk))


if __name__ == "__main__":
    main()
