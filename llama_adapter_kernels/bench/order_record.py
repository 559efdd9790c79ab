"""From races of cuda and triton to the record that chooses between them (`ops/order.py`)."""

import math
from pathlib import Path

from llama_adapter_kernels.bench.results import Results
from llama_adapter_kernels.ops import order


def entries_of(results: Results) -> list[order.Entry]:
    """What the races of a benchmark on a GPU say: those in which both backends were timed.

    Raises:
        OrderError: no race of attention, packed attention or decode has times of both.
    """
    capability = results.machine.get("gpu_compute_capability")
    found: dict[tuple[order.Pass, str, int], list[float]] = {}
    for peers in results.races().values():
        cuda, triton = peers.get("ours-cuda"), peers.get("ours-triton")
        if cuda is None or triton is None or not (cuda.median and triton.median):
            continue
        if cuda.question not in ("attention", "varlen", "decode"):
            continue
        pass_name: order.Pass = (
            "decode" if cuda.question == "decode" else "forward" if cuda.mode == "forward" else "backward"
        )
        key = (pass_name, cuda.dtype, order.head_dim_class(cuda.shape["head_dim"]))
        found.setdefault(key, []).append(math.log(triton.median / cuda.median))
    if not found or capability is None:
        raise order.OrderError("no race on a GPU has times of both cuda and triton, there is no order to record")
    entries = []
    for (pass_name, dtype, head_dim), logs in found.items():
        mean = sum(logs) / len(logs)  # of log(triton / cuda)
        entries.append(
            order.Entry(
                capability, pass_name, dtype, head_dim, "cuda" if mean >= 0 else "triton", round(math.exp(abs(mean)), 4),
                len(logs), str(results.machine.get("gpu", "")), results.recorded,
            )
        )  # fmt: skip
    return entries


def record(results: Results, path: Path) -> list[order.Entry]:
    """Puts what the races say into the record, over what it had for the same keys; returns these entries.

    Raises:
        OrderError: there is nothing to record, or the file is no record.
        OSError: the file cannot be written.
    """
    entries = entries_of(results)
    order.save(order.load(path) | {entry.key: entry for entry in entries}, path)
    order.forget()
    return entries
