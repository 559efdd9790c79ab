"""Which adapter, and which condition, each sequence of a forward pass uses."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

Entry = tuple[str, int | None]  # adapter name, row of the adapter's conditions (None: the prompt as it is)


class Selection:
    """One adapter for the whole batch, or one adapter (or none) for each sequence. Never changes once it is made.

    Conditions are what an image or a sound adds to the prompts of one sequence. They are kept once per row, however often
    generation repeats a sequence for its beams: sequences point at rows.

    Args:
        names: of the adapters, one per sequence; None: the plain base model.
        whole: `names` holds one name, for every sequence of a batch of any size.
        conditions: by adapter name, [N, P, hidden] for all layers or [N, L, P, hidden] for the L adapted layers in order.
        rows: for each sequence the row of its adapter's conditions; None: the sequence has no condition.
    """

    __slots__ = ("conditions", "entries", "names", "rows", "whole")

    def __init__(
        self,
        names: Sequence[str | None],
        whole: bool = False,
        conditions: Mapping[str, Tensor] | None = None,
        rows: Sequence[int | None] | None = None,
    ) -> None:
        self.names = tuple(names)
        self.whole = whole
        self.conditions = dict(conditions or {})
        self.rows: tuple[int | None, ...] = tuple(rows) if rows is not None else (None,) * len(self.names)
        pairs = zip(self.names, self.rows, strict=True)
        # What the batch uses, each once: the entries of its prefix tables.
        self.entries: tuple[Entry, ...] = tuple(dict.fromkeys((name, row) for name, row in pairs if name is not None))

    def index(self, entries: Sequence[Entry], repeats: int) -> list[int]:
        """For every sequence the position of its entry in `entries`, -1 where it is not there; each `repeats` times."""
        place = {entry: i for i, entry in enumerate(entries)}
        each = [
            -1 if name is None else place.get((name, row), -1) for name, row in zip(self.names, self.rows, strict=True)
        ]
        return [i for i in each for _ in range(repeats)]

    def condition(self, name: str, rows: Sequence[int], layer: int) -> Tensor:
        """[len(rows), P, hidden]: the conditions of these rows for the adapter's adapted layer number `layer` (from 0)."""
        tensor = self.conditions[name]
        if tensor.dim() == 4:
            tensor = tensor[:, layer]
        return tensor if list(rows) == list(range(tensor.shape[0])) else tensor[list(rows)]

    def __deepcopy__(self, memo: dict[int, Any]) -> "Selection":
        return self
