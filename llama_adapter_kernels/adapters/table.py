"""Prefixes of one layer in the form that the operation takes: one for all sequences, or a table with an index.

The operation lets every query see all P slots of its prefix, so one table holds prefixes of one length. Where adapters of
different lengths meet in a batch, a prefix whose length divides the longest is written several times over: a softmax over
n copies of the same slots gives the same mean of values. Lengths that do not divide it get tables of their own; each adds
its branch by a call without any words (MATH: with no keys the output is gate * O_p alone).
"""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Prefix(NamedTuple):
    """Key and value [A, Hkv, P, D] in the query's dtype and gate [A, Hq] of A prefixes."""

    key: Tensor
    value: Tensor
    gate: Tensor


class LayerPrefix(NamedTuple):
    """What one layer adds to its attention.

    Attributes:
        key, value, gate: as in Prefix. A is 1 (shared by the batch), the batch size (one each), or any with an index.
        prefix_index: int32 [B], the prefix of each sequence, -1 for none; or None.
        others: further prefixes of other lengths, for other sequences of the batch.
    """

    key: Tensor
    value: Tensor
    gate: Tensor
    prefix_index: Tensor | None = None
    others: tuple["LayerPrefix", ...] = ()


def join(groups: Sequence[tuple[Sequence[int], Prefix]], index: Sequence[int]) -> LayerPrefix | None:
    """One table of these prefixes, or several by length.

    Args:
        groups: (numbers, prefixes of one length with A = len(numbers)); a number names one prefix.
        index: for every sequence of the batch the number of its prefix, or -1.

    Returns:
        None if no sequence has a prefix.
    """
    tables: list[LayerPrefix] = []
    left = sorted(groups, key=lambda group: -group[1].key.shape[2])
    while left:
        longest = left[0][1].key.shape[2]
        fitting = [group for group in left if longest % group[1].key.shape[2] == 0]
        left = [group for group in left if longest % group[1].key.shape[2] != 0]
        place = {number: i for i, number in enumerate(number for numbers, _ in fitting for number in numbers)}
        tables.append(_table([prefix for _, prefix in fitting], [place.get(number, -1) for number in index], longest))
    return tables[0]._replace(others=tuple(tables[1:])) if tables else None


def _table(prefixes: Sequence[Prefix], index: list[int], length: int) -> LayerPrefix:
    keys, values, gates = zip(*(_repeated(prefix, length) for prefix in prefixes), strict=True)
    key, value, gate = (tensors[0] if len(tensors) == 1 else torch.cat(tensors) for tensors in (keys, values, gates))
    if index == list(range(key.shape[0])) or (key.shape[0] == 1 and -1 not in index):
        return LayerPrefix(key, value, gate)  # one per sequence in order, or shared by the whole batch
    return LayerPrefix(key, value, gate, torch.tensor(index, dtype=torch.int32, device=key.device))


def _repeated(prefix: Prefix, length: int) -> Prefix:
    times = length // prefix.key.shape[2]
    if times == 1:
        return prefix
    return Prefix(prefix.key.repeat(1, 1, times, 1), prefix.value.repeat(1, 1, times, 1), prefix.gate)


class FrozenPrefixes:
    """Prefixes that their owners declared final, kept for the adapters used most recently within a number of bytes.

    Threads may use it at the same time. An adapter whose prefixes were dropped has them computed again when it is used.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._kept: OrderedDict[str, dict[tuple[int, torch.dtype], Prefix]] = OrderedDict()
        self._bytes: dict[str, int] = {}
        self._lock = threading.Lock()

    @property
    def max_bytes(self) -> int:
        return self._max_bytes

    @max_bytes.setter
    def max_bytes(self, value: int) -> None:
        with self._lock:
            self._max_bytes = value
            self._drop_oldest()

    def bytes_by_adapter(self) -> dict[str, int]:
        """Bytes kept per adapter, the one used longest ago first."""
        with self._lock:
            return {name: self._bytes[name] for name in self._kept}

    def get(self, name: str, layer: int, dtype: torch.dtype) -> Prefix | None:
        """The prefix (A = 1) kept for this adapter and layer in this dtype."""
        with self._lock:
            layers = self._kept.get(name)
            if layers is None:
                return None
            self._kept.move_to_end(name)
            return layers.get((layer, dtype))

    def keep(self, name: str, layer: int, dtype: torch.dtype, prefix: Prefix) -> None:
        """Keeps a prefix; adapters used longest ago give way."""
        with self._lock:
            layers = self._kept.setdefault(name, {})
            if (layer, dtype) not in layers:
                self._bytes[name] = self._bytes.get(name, 0) + sum(tensor.nbytes for tensor in prefix)
            layers[layer, dtype] = prefix
            self._kept.move_to_end(name)
            self._drop_oldest()

    def forget(self, name: str) -> None:
        """Drops what is kept for an adapter."""
        with self._lock:
            self._kept.pop(name, None)
            self._bytes.pop(name, None)

    def _drop_oldest(self) -> None:
        total = sum(self._bytes.values())
        while total > self._max_bytes:
            name, _ = self._kept.popitem(last=False)
            total -= self._bytes.pop(name)

    def __reduce__(self) -> tuple[type["FrozenPrefixes"], tuple[int]]:
        return FrozenPrefixes, (self._max_bytes,)  # copies and pickles of a model start empty
