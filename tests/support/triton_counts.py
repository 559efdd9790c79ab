"""Counts what interpreted kernels do: programs and whether they had work, rows of tiles that were used, bytes of global
memory as asked for and as they pass a small cache."""

from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

LINE = 128  # bytes of a line of the L2 cache


@dataclass
class KernelCounts:
    """One kernel, over all its launches. Bytes are by tensor name."""

    programs: int = 0
    with_work: int = 0  # programs that computed some matrix product
    loaded: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    stored: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    missed: dict[str, int] = field(
        default_factory=lambda: defaultdict(int)
    )  # bytes of lines that the cache had to fetch
    rows: dict[str, list[int]] = field(
        default_factory=lambda: defaultdict(lambda: [0, 0])
    )  # [rows used, rows] of tiles

    @property
    def asked(self) -> int:
        return sum(self.loaded.values()) + sum(self.stored.values())

    @property
    def fetched(self) -> int:
        return sum(self.missed.values()) + sum(self.stored.values())


class Counter:
    """Counts per kernel. The cache holds `cache_bytes`, keeps what was used last, and starts empty at every launch."""

    def __init__(self, cache_bytes: int) -> None:
        self.kernels: dict[str, KernelCounts] = defaultdict(KernelCounts)
        self.ranges: list[tuple[int, int, str]] = []
        self.capacity = cache_bytes // LINE
        self.cache: OrderedDict[int, None] = OrderedDict()
        self.current = KernelCounts()

    def name_tensors(self, **tensors: Tensor | None) -> None:
        for name, tensor in tensors.items():
            if tensor is not None and tensor.numel() > 0:
                storage = tensor.untyped_storage()
                self.ranges.append((storage.data_ptr(), storage.data_ptr() + storage.nbytes(), name))

    def name_of(self, address: int) -> str:
        return next((name for begin, end, name in reversed(self.ranges) if begin <= address < end), "other")

    def launch(self, kernel: str) -> None:
        self.current = self.kernels[kernel]
        self.cache.clear()

    def access(self, pointers: Any, mask: Any, itemsize: int, is_store: bool) -> None:
        pointers, mask = np.broadcast_arrays(pointers, mask if isinstance(mask, np.ndarray) else mask.data)
        mask = mask.astype(bool)
        used = pointers[mask]
        if used.size == 0:
            if pointers.ndim == 2 and not is_store:
                self._rows(self.name_of(int(pointers.flat[0])), mask)
            return
        name = self.name_of(int(used[0]))
        counts = self.current.stored if is_store else self.current.loaded
        counts[name] += int(np.unique(used).size) * itemsize
        if is_store:
            return
        if pointers.ndim == 2:
            self._rows(name, mask)
        for line in np.unique(used // np.uint64(LINE)).tolist():
            if line in self.cache:
                self.cache.move_to_end(line)
                continue
            self.current.missed[name] += LINE
            self.cache[line] = None
            if len(self.cache) > self.capacity:
                self.cache.popitem(last=False)

    def _rows(self, name: str, mask: Any) -> None:
        rows = self.current.rows[name]
        rows[0] += int(mask.any(axis=1).sum())
        rows[1] += mask.shape[0]


@contextmanager
def counting(cache_bytes: int = 1 << 20) -> Iterator[Counter]:
    """Within the context everything the interpreter runs is counted, and no matrix is multiplied: results mean nothing."""
    from triton.runtime import interpreter

    counter = Counter(cache_bytes)
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, dot, call, place = (
        builder.create_masked_load, builder.create_masked_store, builder.create_dot, executor.__call__,
        builder.set_grid_idx,
    )  # fmt: skip
    computed = [False]

    def counted_load(self: Any, pointers: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        counter.access(pointers.data, mask, pointers.get_element_ty().primitive_bitwidth // 8, False)
        return load(self, pointers, mask, *rest, **options)

    def counted_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        counter.access(pointers.data, mask, pointers.get_element_ty().primitive_bitwidth // 8, True)
        return store(self, pointers, value, mask, *rest)

    def counted_dot(self: Any, a: Any, b: Any, accumulator: Any, *rest: Any) -> Any:
        computed[0] = True
        return accumulator

    def end_program() -> None:
        counter.current.with_work += computed[0]
        computed[0] = False

    def counted_place(self: Any, x: int, y: int, z: int) -> None:
        end_program()
        counter.current.programs += 1
        place(self, x, y, z)

    def counted_call(self: Any, *arguments: Any, **options: Any) -> Any:
        counter.launch(self.fn.__name__)
        try:
            return call(self, *arguments, **options)
        finally:
            end_program()

    builder.create_masked_load, builder.create_masked_store, builder.create_dot = (
        counted_load,
        counted_store,
        counted_dot,
    )
    builder.set_grid_idx, executor.__call__ = counted_place, counted_call
    try:
        yield counter
    finally:
        builder.create_masked_load, builder.create_masked_store, builder.create_dot = load, store, dot
        builder.set_grid_idx, executor.__call__ = place, call
