"""The arguments of the ops in Python, in the order of schemas.txt: what C++ has in csrc/op/arguments.h.

forward(*Inputs, *Options), backward(doutput, *Inputs, output, logsumexp, *Options, *Needed); decode has some of the Options.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]  # of Inputs


class Inputs(NamedTuple):
    """What has a gradient. Shapes and dtypes are those of `zero_gate_attention`, or packed; the gate is [A, Hq]."""

    query: Tensor
    key: Tensor
    value: Tensor
    prefix_key: Tensor | None
    prefix_value: Tensor | None
    gate: Tensor | None


class Options(NamedTuple):
    """What has none. Integer tensors are int32; cu_seqlens_* are None for padded problems."""

    attn_mask: Tensor | None
    key_start: Tensor | None
    key_end: Tensor | None
    prefix_index: Tensor | None
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    max_seqlen_q: int
    max_seqlen_k: int
    scale: float
    is_causal: bool


class Needed(NamedTuple):
    """Which gradients `backward` gives; the others have shape [0]."""

    dquery: bool
    dkey_dvalue: bool
    dprefix: bool
    deterministic: bool


class Backward(NamedTuple):
    """All of `backward`."""

    doutput: Tensor
    inputs: Inputs
    output: Tensor
    logsumexp: Tensor
    options: Options
    needed: Needed


def of_forward(arguments: Sequence[Any]) -> tuple[Inputs, Options]:
    return Inputs(*arguments[:6]), Options(*arguments[6:])


def of_backward(arguments: Sequence[Any]) -> Backward:
    doutput, inputs, (output, logsumexp), rest = arguments[0], arguments[1:7], arguments[7:9], arguments[9:]
    return Backward(doutput, Inputs(*inputs), output, logsumexp, Options(*rest[:10]), Needed(*rest[10:]))
