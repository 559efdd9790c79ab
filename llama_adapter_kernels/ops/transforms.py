"""The ops under torch.func: grad, vjp, jacrev and vmap, in any order.

A custom op cannot take part in these transforms (its gradient is registered below them), an autograd.Function with a rule
for vmap can. It runs the same ops: a batched dimension becomes more sequences of one call.
"""

from typing import Any

import torch
from torch import Tensor

from llama_adapter_kernels.ops import checks

# Positions among the ops' arguments.
PREFIX = slice(3, 6)  # prefix_key, prefix_value, gate
PREFIX_INDEX = 9
CU_SEQLENS_Q = 10


@torch.compiler.assume_constant_result
def active() -> bool:
    """Whether a torch.func transform is running here (or is being traced)."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def forward(packet: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
    """`packet.forward`, differentiable and batchable by torch.func."""
    _leave_to_eager()
    result: tuple[Tensor, Tensor] = _Forward.apply(packet, *arguments)
    return result


def decode(packet: Any, *arguments: Any) -> Tensor:
    """`packet.decode`, batchable by torch.func."""
    _leave_to_eager()
    result: Tensor = _Decode.apply(packet, *arguments)
    return result


def _leave_to_eager() -> None:
    """The compiler does not trace these functions inside of a transform: with fullgraph=True it says so."""
    if torch.compiler.is_compiling():
        torch._dynamo.graph_break(
            msg='zero-gate attention in a torch.func transform is not compiled (backend="reference" is)'
        )


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(packet: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        output, logsumexp = packet.forward(*arguments)
        return output, logsumexp

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        packet, *arguments = inputs
        ctx.save_for_backward(*arguments[:12], *output)
        ctx.rest = packet, arguments[12:]
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, doutput: Tensor, dlogsumexp: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, output, logsumexp = ctx.saved_tensors
        packet, scalars = ctx.rest
        need = ctx.needs_input_grad[1:]
        needs = (need[0], need[1] or need[2], any(need[PREFIX]), torch.are_deterministic_algorithms_enabled())
        gradients = _Backward.apply(packet, doutput, *tensors[:6], output, logsumexp, *tensors[6:], *scalars, *needs)
        wanted = (gradient if needed else None for gradient, needed in zip(gradients, need[:6], strict=True))
        return (None, *wanted, *(None,) * 10)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        checks.refuse_forward_mode()

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], packet: Any, *arguments: Any) -> tuple[Any, Any]:
        if arguments[CU_SEQLENS_Q] is not None:
            return _one_by_one(info.batch_size, in_dims, lambda *each: _Forward.apply(packet, *each), *arguments)
        folded = _fold(info.batch_size, in_dims[1:11], arguments[:10])
        return _unfold(info.batch_size, _Forward.apply(packet, *folded, *arguments[10:])), (0, 0)


class _Backward(torch.autograd.Function):
    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        checks.refuse_forward_mode()

    @staticmethod
    def forward(packet: Any, *arguments: Any) -> tuple[Tensor, ...]:
        return tuple(packet.backward(*arguments))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        raise RuntimeError(
            'zero-gate attention has no second derivative (double backward); use backend="reference" for one'
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], packet: Any, *arguments: Any) -> tuple[Any, Any]:
        doutput, inputs, (output, logsumexp), options = arguments[0], arguments[1:7], arguments[7:9], arguments[9:]
        dims = in_dims[1:]
        if options[CU_SEQLENS_Q - 6] is not None:
            return _one_by_one(info.batch_size, in_dims, lambda *each: _Backward.apply(packet, *each), *arguments)
        size = info.batch_size
        # Each example has gradients of its own for a prefix that they share.
        folded = _fold(size, (*dims[1:7], *dims[9:13]), (*inputs, *options[:4]), own_prefix=True)
        extra = [
            _front(t, d, size).flatten(0, 1)
            for t, d in zip((doutput, output, logsumexp), (dims[0], *dims[7:9]), strict=True)
        ]
        gradients = _Backward.apply(packet, extra[0], *folded[:6], *extra[1:], *folded[6:], *options[4:])
        return _unfold(size, gradients), (0,) * 6


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(packet: Any, *arguments: Any) -> Tensor:
        result: Tensor = packet.decode(*arguments)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, doutput: Tensor) -> None:
        raise RuntimeError("zero_gate_decode has no gradient; use zero_gate_attention")

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], packet: Any, *arguments: Any) -> tuple[Any, Any]:
        size = info.batch_size
        folded = _fold(size, (*in_dims[1:7], None, *in_dims[7:10]), (*arguments[:6], None, *arguments[6:9]))
        del folded[6]  # decode takes no mask
        return _unfold(size, (_Decode.apply(packet, *folded, *arguments[9:]),))[0], 0


def _front(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """The batched dimension first; an example's tensor repeated where there is none."""
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _fold(
    size: int, dims: tuple[int | None, ...], arguments: tuple[Tensor | None, ...], own_prefix: bool = False
) -> list[Tensor | None]:
    """query to prefix_index of `size` examples as those of one call, whose sequences are theirs one after the other."""
    folded = [None if t is None else _front(t, d, size).flatten(0, 1) for t, d in zip(arguments, dims, strict=True)]
    query, prefix_key, index = arguments[0], arguments[3], arguments[PREFIX_INDEX]
    if query is None or prefix_key is None:
        return folded
    batch = query.shape[0] if dims[0] is None else query.movedim(dims[0], 0).shape[1]
    count = prefix_key.shape[0] if dims[3] is None else prefix_key.movedim(dims[3], 0).shape[1]
    if index is None and count == 1 and not own_prefix and dims[PREFIX] == (None, None, None):
        folded[PREFIX] = arguments[PREFIX]  # shared by all of them
        return folded
    # One table of all examples' prefixes, and for every sequence its entry there.
    entry = torch.arange(batch if count > 1 else 1, device=query.device).expand(batch) if index is None else index
    entries = _front(entry, None if index is None else dims[PREFIX_INDEX], size)
    first = torch.arange(size, device=query.device)[:, None] * count
    folded[PREFIX_INDEX] = torch.where(entries < 0, -1, entries + first).flatten().to(torch.int32)
    return folded


def _unfold(size: int, results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The examples' results apart again; a gradient that nobody asked for, [0], is so for each."""
    return tuple(
        result.unflatten(0, (size, -1)) if result.shape != (0,) else result.expand(size, 0) for result in results
    )


def _one_by_one(size: int, in_dims: tuple[Any, ...], call: Any, *arguments: Any) -> tuple[Any, Any]:
    """Packed sequences have no batch to fold into: a call for each example."""
    dims = in_dims[1:]
    results = [
        call(*(a if d is None else a.select(d, example) for a, d in zip(arguments, dims, strict=True)))
        for example in range(size)
    ]
    return tuple(torch.stack(parts) for parts in zip(*results, strict=True)), (0,) * len(results[0])
