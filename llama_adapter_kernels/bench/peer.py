"""The interface that every contestant has."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from torch import Tensor

ProblemType = TypeVar("ProblemType")


def as_it_is(name: str, tensor: Tensor) -> Tensor:
    return tensor


@dataclass
class Prepared:
    """A contestant with its inputs in the layout that it wants.

    call: computes the output. leaves: inputs whose gradients are asked for, by the problem's names; doutput goes with
    the output. unpack: brings a result ("output", "dquery", ...) into the layout of the problem's own tensors.
    """

    call: Callable[[], Tensor]
    leaves: dict[str, Tensor]
    doutput: Tensor | None
    unpack: Callable[[str, Tensor], Tensor] = field(default=as_it_is)


@dataclass(frozen=True)
class Peer(Generic[ProblemType]):
    """prefix: False for those that compute attention without the adapter, the lower bound.

    prepare: (problem, whether a gradient will be asked for) -> Prepared; whatever it raises is the reason why not.
    products: it calls torch's matrix product in the problem's dtype, which some CPUs have no instructions for.
    reason: (problem, backward) -> why it cannot run, None when it can, for what is known without trying.
    """

    name: str
    label: str
    prepare: Callable[[ProblemType, bool], Prepared]
    prefix: bool = True
    ours: bool = False
    quick: bool = False
    products: bool = False
    reason: Callable[[ProblemType, bool], str | None] = lambda problem, backward: None
