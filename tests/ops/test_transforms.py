"""torch.func over the functions: gradients and batches in any order equal the reference's; what does not work says so."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian, jacrev, vjp, vmap

from llama_adapter_kernels import zero_gate_attention, zero_gate_attention_varlen, zero_gate_decode

EXAMPLES = 3
ALL = tuple(range(6))


def inputs() -> list[Tensor]:
    """2 sequences, 4/2 heads, 5 tokens, head_dim 8, 3 prefix slots."""
    shapes = ((2, 4, 5, 8), (2, 2, 5, 8), (2, 2, 5, 8), (1, 2, 3, 8), (1, 2, 3, 8), (4,))
    return [torch.randn(shape) for shape in shapes]


def batched(dims: tuple[int | None, ...]) -> list[Tensor]:
    return [
        t if d is None else torch.randn(EXAMPLES, *t.shape).movedim(0, d) for t, d in zip(inputs(), dims, strict=True)
    ]


def attention(backend: str, **options: Any) -> Callable[..., Tensor]:
    return lambda *tensors: zero_gate_attention(*tensors, is_causal=True, backend=backend, **options)


def loss(backend: str, **options: Any) -> Callable[..., Tensor]:
    return lambda *tensors: attention(backend, **options)(*tensors).square().sum()


def same(make: Callable[[str], Any]) -> None:
    """make("cpu") equals make("reference"), whose transforms are those of plain torch operations."""
    torch.testing.assert_close(make("cpu"), make("reference"), atol=1e-4, rtol=1e-4)


def test_grad_and_vjp() -> None:
    tensors = inputs()
    same(lambda backend: grad(loss(backend), argnums=ALL)(*tensors))
    cotangent = torch.randn(2, 4, 5, 8)
    same(lambda backend: vjp(attention(backend), *tensors)[1](cotangent))


DIMS = [
    pytest.param((0, 0, 0, None, None, None), id="texts"),
    pytest.param((None, None, None, 0, 0, 0), id="adapters"),
    pytest.param((None, 1, None, None, 2, None), id="some"),
    pytest.param((0,) * 6, id="all"),
]
OPTIONS = [
    {},
    {"key_start": torch.tensor([1, 0]), "key_end": torch.tensor([5, 4])},
    {"attn_mask": torch.ones(5, 5, dtype=torch.bool).tril(-1)},
    {"prefix_index": torch.tensor([-1, 0])},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: next(iter(options), "plain"))
@pytest.mark.parametrize("dims", DIMS)
def test_vmap(dims: tuple[int | None, ...], options: dict[str, Any]) -> None:
    """Alone, of per-example gradients, and inside of a gradient."""
    tensors = batched(dims)
    same(lambda backend: vmap(attention(backend, **options), in_dims=dims)(*tensors))
    same(lambda backend: vmap(grad(loss(backend, **options), argnums=ALL), in_dims=dims)(*tensors))
    same(lambda backend: grad(lambda *t: vmap(loss(backend, **options), in_dims=dims)(*t).sum(), argnums=ALL)(*tensors))


def test_vmap_of_a_table_and_of_its_index() -> None:
    q, k, v, *_ = inputs()
    table = [torch.randn(EXAMPLES, 2, 2, 3, 8) for _ in range(2)]
    gate, index = torch.randn(EXAMPLES, 2, 4), torch.tensor([[0, 1], [1, -1], [-1, 0]])

    def call(backend: str, index: Tensor | None, *prefix: Tensor) -> Tensor:
        return zero_gate_attention(q, k, v, *prefix, prefix_index=index, backend=backend).square().sum()

    for dims in ((0, 0, 0, 0), (0, None, None, None), (None, 0, 0, 0)):
        arguments = [t if d == 0 else t[0] for t, d in zip((index, *table, gate), dims, strict=True)]
        same(lambda b, a=arguments, d=dims: vmap(grad(call, argnums=(2, 3, 4)), in_dims=(None, *d))(b, *a))  # type: ignore[misc]
    # One entry per sequence.
    same(lambda b: vmap(grad(call, argnums=(2, 3, 4)), in_dims=(None, None, 0, 0, 0))(b, None, *table, gate))


def test_vmap_of_packed_sequences() -> None:
    q, k, v = torch.randn(EXAMPLES, 7, 4, 8), torch.randn(7, 2, 8), torch.randn(EXAMPLES, 7, 2, 8)
    _, _, _, *prefix = inputs()
    offsets = torch.tensor([0, 2, 6])

    def call(backend: str, *tensors: Tensor) -> Tensor:
        return zero_gate_attention_varlen(
            *tensors, *prefix, cu_seqlens_q=offsets, cu_seqlens_k=offsets, max_seqlen_q=4, max_seqlen_k=4,
            is_causal=True, backend=backend,
        ).square().sum()  # fmt: skip

    dims = (None, 0, None, 0)
    separate = [grad(call, argnums=(1, 2, 3))("cpu", q[i], k, v[i]) for i in range(EXAMPLES)]
    together = vmap(grad(call, argnums=(1, 2, 3)), in_dims=dims)("cpu", q, k, v)
    torch.testing.assert_close(together, tuple(torch.stack(parts) for parts in zip(*separate, strict=True)))


@pytest.mark.parametrize("lengths", [None, torch.tensor([5, 3])])
def test_vmap_of_decode(lengths: Tensor | None) -> None:
    for dims in ((0, 0, 0, None, None, None), (None, None, None, 0, 0, 0)):
        tensors = batched(dims)

        def call(backend: str, q: Tensor, k: Tensor, v: Tensor, *prefix: Tensor) -> Tensor:
            return zero_gate_decode(q[:, :, -1:], k, v, lengths, *prefix, backend=backend)

        same(lambda b, c=call, d=dims, t=tensors: vmap(c, in_dims=(None, *d))(b, *t))  # type: ignore[misc]


def test_jacrev() -> None:
    *tensors, gate = inputs()
    same(lambda backend: jacrev(lambda g: attention(backend)(*tensors, g))(gate))


def test_values_are_checked_where_they_can_be_read() -> None:
    tensors = batched((0,) * 6)
    ends = torch.tensor([[5, 6], [5, 5], [5, 5]])
    with pytest.raises(RuntimeError, match="key_end: expected values from 0 to 5, got 6 at position 1"):
        vmap(lambda end, *t: zero_gate_attention(*t, key_end=end, backend="cpu"))(ends, *tensors)


def test_second_derivatives_and_tangents_are_refused() -> None:
    q, *rest = inputs()

    def function(x: Tensor) -> Tensor:
        return loss("cpu")(x, *rest)

    with pytest.raises(RuntimeError, match="no second derivative"):
        jacrev(jacrev(function))(q)
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        hessian(function)(q)  # forward over reverse
    with pytest.raises(ValueError, match="query: expected no gradient"):
        grad(lambda x: zero_gate_decode(x, *rest[:2], None, *rest[2:]).sum())(q)


def test_compiled_transforms_say_that_they_are_not() -> None:
    whole = torch.compile(grad(loss("cpu")), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"in a torch.func transform is not compiled"):
        whole(*inputs())
