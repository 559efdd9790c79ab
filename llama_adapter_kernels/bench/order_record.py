"""From races to the records that choose: cuda or triton (`ops/order.py`), and tiles of cuda (`ops/cuda_tiles.py`)."""

import math
from pathlib import Path

from llama_adapter_kernels.bench.results import Results
from llama_adapter_kernels.ops import cuda_tiles, order
from llama_adapter_kernels.ops.record_file import RecordError


def entries_of(results: Results) -> list[order.Entry]:
    """What the races of a benchmark on a GPU say: those in which both backends were timed.

    Raises:
        RecordError: no race of attention, packed attention or decode has times of both.
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
        raise RecordError("no race on a GPU has times of both cuda and triton, there is no order to record")
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
        RecordError: there is nothing to record, or the file is no record.
        OSError: the file cannot be written.
    """
    entries = entries_of(results)
    order.save(order.load(path) | {entry.key: entry for entry in entries}, path)
    order.forget()
    return entries


def tiles_of(results: Results) -> list[cuda_tiles.Entry]:
    """What the races say in which both tiles of the CUDA forward kernel were timed: one entry, or none without races."""
    capability = results.machine.get("gpu_compute_capability")
    logs = []  # of the time of 32 keys over that of 64
    for peers in results.races().values():
        wide, narrow = (peers.get(f"ours-cuda-{keys}-keys") for keys in cuda_tiles.KEYS)
        if wide is not None and narrow is not None and wide.median and narrow.median:
            logs.append(math.log(narrow.median / wide.median))
    if not logs or capability is None:
        return []
    mean = sum(logs) / len(logs)
    keys = cuda_tiles.KEYS[0 if mean >= 0 else 1]
    ratio, card = round(math.exp(abs(mean)), 4), str(results.machine.get("gpu", ""))
    return [cuda_tiles.Entry(capability, keys, ratio, len(logs), card, results.recorded)]


def record_tiles(results: Results, path: Path) -> list[cuda_tiles.Entry]:
    """Puts what the races say into the record of tiles, over what it had for the same card; returns these entries.

    Raises:
        RecordError: the file is no record.
        OSError: the file cannot be written.
    """
    entries = tiles_of(results)
    if entries:
        cuda_tiles.save(cuda_tiles.load(path) | {entry.capability: entry for entry in entries}, path)
        cuda_tiles.forget()
    return entries
