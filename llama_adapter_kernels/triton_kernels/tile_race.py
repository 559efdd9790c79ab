"""Chooses tiles by a race on the card at hand, in the manner of triton.autotune, and keeps the winners on disk.

Off unless LAK_TRITON_TUNE=1: another tile adds up in another order, so results would differ in their last bits between a
machine that raced and one that did not. The table of `tuning` then decides. Where it is on, the first call of a kind (see
`Kind`) compiles and times every candidate on its own tensors, some seconds; later calls and processes read the winner.
No race is run while a CUDA graph is captured or deterministic algorithms are asked for.

The file lies in LAK_TRITON_TUNE_CACHE, else in the user's cache folder, one for each card, version of torch and Triton and
content of the kernels' sources. It is replaced as a whole, so that no reader ever sees half of it; one that cannot be read
counts as empty, one that cannot be written is done without.
"""

import functools
import hashlib
import importlib.metadata
import json
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from itertools import pairwise
from pathlib import Path

import torch

from llama_adapter_kernels.triton_kernels.tuning import Tile, capability, family

SWITCH = "LAK_TRITON_TUNE"
FOLDER_VARIABLE = "LAK_TRITON_TUNE_CACHE"
_REPETITIONS = 10

Tiles = tuple[Tile, ...]  # one for `forward`; those of the owners of keys and of queries for `backward_words`

# Beside the table's entry, for 16-bit elements: by phase, family and the head_dim up to which an entry serves.
_CANDIDATES: dict[str, dict[str, dict[int, list[Tiles]]]] = {
    "forward": {
        "sm80": {
            64: [(Tile(128, 128, 8, 2),), (Tile(64, 64, 4, 3),)],
            128: [(Tile(128, 32, 4, 3),), (Tile(64, 64, 4, 2),), (Tile(128, 64, 8, 2),)],
        },
        "sm86": {64: [(Tile(64, 64, 4, 2),)], 128: [(Tile(64, 32, 4, 2),), (Tile(128, 32, 8, 2),)]},
        "sm90": {
            64: [(Tile(64, 128, 4, 3),), (Tile(128, 64, 8, 3),), (Tile(128, 128, 8, 2),)],
            128: [(Tile(128, 64, 8, 3),), (Tile(128, 32, 4, 4),), (Tile(128, 128, 8, 2),)],
        },
        "sm100": {128: [(Tile(128, 64, 4, 3),)]},
    },
    "backward_words": {
        "sm80": {
            64: [(Tile(64, 64, 4, 2), Tile(64, 64, 4, 2))],
            128: [(Tile(32, 64, 4, 2), Tile(64, 32, 4, 2)), (Tile(16, 128, 8, 2), Tile(128, 32, 8, 2))],
        },
        "sm90": {
            64: [(Tile(64, 64, 4, 3), Tile(64, 64, 4, 3)), (Tile(64, 128, 8, 2), Tile(128, 128, 8, 2))],
            128: [(Tile(32, 64, 4, 3), Tile(64, 32, 4, 3)), (Tile(32, 128, 8, 3), Tile(128, 64, 8, 3))],
        },
    },
}


@dataclass(frozen=True)
class Kind:
    """Calls that share one winner."""

    phase: str
    dtype: str
    head_dim: int
    is_causal: bool
    tokens: bool  # a packed axis in full tiles
    length: int  # queries of a sequence, rounded up to a power of two

    @property
    def key(self) -> str:
        return " ".join(str(part) for part in astuple(self))


def kind_of(phase: str, query: torch.Tensor, seq_q: int, is_causal: bool, tokens: bool) -> Kind:
    dtype = str(query.dtype).removeprefix("torch.")
    return Kind(phase, dtype, query.shape[-1], is_causal, tokens, 1 << max(seq_q - 1, 0).bit_length())


def candidates(phase: str, dtype: torch.dtype, head_dim: int, card: str) -> list[Tiles]:
    if dtype == torch.float32:
        return []
    entries = _CANDIDATES[phase].get(card, {})
    return next((tiles for limit, tiles in entries.items() if head_dim <= limit), [])


def choose(
    kind: Kind, device: torch.device, default: Tiles, is_forced: bool, launch: Callable[[Tiles], None]
) -> Tiles:  # fmt: skip
    """The tiles for one launch: the default, or the winner of a race. `launch(tiles)` runs the kernel once."""
    if is_forced or not _may_race(device):
        return default
    winners = _winners(device)
    found = winners.get(kind.key)
    if found is None:
        dtype = getattr(torch, kind.dtype)
        others = candidates(kind.phase, dtype, kind.head_dim, family(capability(device)))
        found = race([default, *(tiles for tiles in others if tiles != default)], launch, device)
        winners[kind.key] = found
        _save(cache_file(device), kind.key, found)
    return found


def race(contestants: Sequence[Tiles], launch: Callable[[Tiles], None], device: torch.device) -> Tiles:
    """The fastest of the contestants, of which the first is the default; one that needs more than the card has is out."""
    from triton.runtime.errors import OutOfResources

    times: dict[Tiles, float] = {}
    for tiles in contestants:
        try:
            launch(tiles)  # compiles
            times[tiles] = milliseconds(functools.partial(launch, tiles), device)
        except OutOfResources:
            continue
    return min(times, key=lambda tiles: times[tiles], default=contestants[0])


def milliseconds(call: Callable[[], None], device: torch.device) -> float:
    """Median time of one call on the device."""
    with torch.cuda.device(device):
        call()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(_REPETITIONS + 1)]
        for event in events[:-1]:
            event.record()
            call()
        events[-1].record()
        torch.cuda.synchronize()
    times: list[float] = [first.elapsed_time(second) for first, second in pairwise(events)]
    return statistics.median(times)


def _may_race(device: torch.device) -> bool:
    if os.environ.get(SWITCH) != "1" or device.type != "cuda":
        return False
    return not torch.are_deterministic_algorithms_enabled() and not torch.cuda.is_current_stream_capturing()


@functools.cache
def _winners(device: torch.device) -> dict[str, Tiles]:
    return load(cache_file(device))


def load(file: Path) -> dict[str, Tiles]:
    """What a file of winners holds; empty when there is none, or none that can be read."""
    try:
        content = json.loads(file.read_text())
        return {key: tuple(Tile(*map(int, tile)) for tile in tiles) for key, tiles in content.items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


def _save(file: Path, key: str, tiles: Tiles) -> None:
    """Adds one winner to the file. Of two processes that do so at once one may win: the other races again."""
    content = {**load(file), key: tiles}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=file.parent, prefix=file.name)
        try:
            with os.fdopen(handle, "w") as stream:
                json.dump(content, stream, indent=0)
            os.replace(name, file)
        except BaseException:
            os.unlink(name)
            raise
    except OSError:  # a full or read-only disk: this process has the winner in memory
        return


def cache_file(device: torch.device) -> Path:
    folder = os.environ.get(FOLDER_VARIABLE)
    if folder is None:
        folder = os.path.join(
            os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "llama-adapter-kernels"
        )
    versions = f"{torch.__version__} {importlib.metadata.version('triton')} {sources_digest()}"
    card = "".join(letter if letter.isalnum() else "-" for letter in torch.cuda.get_device_name(device))
    return Path(folder) / f"triton-tiles-{card}-{hashlib.sha256(versions.encode()).hexdigest()[:16]}.json"


@functools.cache
def sources_digest() -> str:
    """Changes with every change of a kernel."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()
