"""Contestants for attention over a (padded) batch and, with one query, for decoding against a cache."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from llama_adapter_kernels import zero_gate_decode
from llama_adapter_kernels.bench.peer import Peer, Prepared
from llama_adapter_kernels.ops import backends, cuda_tiles, reference
from llama_adapter_kernels.testing import Problem

SDPA_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def leaves(problem: Problem) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in problem.tensors.items() if tensor is not None}


def sdpa_mask(problem: Problem) -> tuple[Tensor | None, bool]:
    """(attn_mask, is_causal) for scaled_dot_product_attention: with a mask only where there is no other way."""
    case, tensors = problem.case, leaves(problem)
    key_end = problem.arguments.get("key_end")
    if key_end is not None:
        is_causal = case.is_causal and case.seq_q > 1  # one query sees all valid keys
        one_head = (tensors["query"][:, :1], tensors["key"][:, :1])
        return reference.allowed_keys(*one_head, is_causal, None, None, key_end), False
    return None, case.is_causal and case.seq_q > 1


def two_calls(
    query: Tensor, key: Tensor, value: Tensor, prefix_key: Tensor | None, prefix_value: Tensor | None,
    gate: Tensor | None, *, attn_mask: Tensor | None, is_causal: bool, scale: float | None = None,
) -> Tensor:  # fmt: skip
    """What one writes without this package: two calls and one multiply-add; without a prefix one call.

    Args:
        gate: [Hq], or anything of three dimensions that can be multiplied with the output.
    """
    grouped = query.shape[1] != key.shape[1]
    words = scaled_dot_product_attention(
        query, key, value, attn_mask=attn_mask, is_causal=is_causal, scale=scale, enable_gqa=grouped
    )
    if prefix_key is None or prefix_value is None or gate is None:
        return words
    shape = (query.shape[0], -1, -1, -1)
    prefix = scaled_dot_product_attention(
        query, prefix_key.expand(shape), prefix_value.expand(shape), scale=scale, enable_gqa=grouped
    )
    return torch.addcmul(words, gate.to(words.dtype).view(gate.shape + (1,) * (3 - gate.dim())), prefix)


def eager(
    query: Tensor, key: Tensor, value: Tensor, prefix_key: Tensor, prefix_value: Tensor, gate: Tensor, *,
    bias: Tensor | None, scale: float,
) -> Tensor:  # fmt: skip
    """Prefix and words in one matrix of scores, as LLaMA-Adapter's published model code computes it.

    The two parts get a float32 softmax each, rounded to the inputs' dtype, the prefix part its gate, and one product
    with the values follows.

    Args:
        bias: added to the scores of the words; -inf hides a key.
    """
    batch, slots, group = query.shape[0], prefix_key.shape[2], query.shape[1] // key.shape[1]
    keys = torch.cat((prefix_key.expand(batch, -1, -1, -1), key), dim=2)
    values = torch.cat((prefix_value.expand(batch, -1, -1, -1), value), dim=2)
    if group > 1:
        keys, values = keys.repeat_interleave(group, dim=1), values.repeat_interleave(group, dim=1)
    scores = torch.matmul(query, keys.transpose(2, 3)) * scale
    words = scores[..., slots:] if bias is None else scores[..., slots:] + bias
    prefix_part = torch.softmax(scores[..., :slots], dim=-1, dtype=torch.float32)
    parts = (gate[:, None, None] * prefix_part, torch.softmax(words, dim=-1, dtype=torch.float32))
    return torch.matmul(torch.cat([part.to(query.dtype) for part in parts], dim=-1), values)


def bias_of(attn_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where a bool mask is true, -inf elsewhere."""
    return torch.zeros(attn_mask.shape, dtype=dtype, device=attn_mask.device).masked_fill_(~attn_mask, -torch.inf)


def _prepare_sdpa(backend: SDPBackend | None, problem: Problem, backward: bool) -> Prepared:
    tensors = leaves(problem)
    attn_mask, is_causal = sdpa_mask(problem)
    arguments = tuple(problem.tensors.values())

    def only() -> AbstractContextManager[None]:
        return nullcontext() if backend is None else sdpa_kernel(backend)

    def call() -> Tensor:
        with only():
            return two_calls(*arguments, attn_mask=attn_mask, is_causal=is_causal, scale=problem.case.scale)

    return Prepared(call, tensors, problem.doutput)


def _prepare_sdpa_rows(problem: Problem, backward: bool) -> Prepared:
    """One new token and grouped heads: the heads of a group become the rows of one query, which reads their key/value
    head once. `enable_gqa` copies it for each head on a CPU.
    """
    attn_mask, _ = sdpa_mask(problem)
    query, key, value, prefix_key, prefix_value, gate = problem.tensors.values()
    assert query is not None
    assert key is not None
    assert value is not None
    rows = (query.shape[0], key.shape[1], query.shape[1] // key.shape[1], query.shape[3])

    def call() -> Tensor:
        gates = None if gate is None else gate.view(*rows[1:3], 1)
        output = two_calls(query.view(rows), key, value, prefix_key, prefix_value, gates, attn_mask=attn_mask,
                           is_causal=False, scale=problem.case.scale)  # fmt: skip
        return output.view(query.shape)

    return Prepared(call, leaves(problem), problem.doutput)


def _rows_reason(problem: Problem, backward: bool) -> str | None:
    case = problem.case
    return None if case.seq_q == 1 and case.heads_q != case.heads_kv else "only for one new token and grouped heads"


def _prepare_eager(problem: Problem, backward: bool) -> Prepared:
    tensors = leaves(problem)
    attn_mask, is_causal = sdpa_mask(problem)
    query, key = tensors["query"], tensors["key"]
    if is_causal:
        attn_mask = reference.allowed_keys(query[:1, :1], key[:1, :1], True, None, None, None)
    bias = None if attn_mask is None else bias_of(attn_mask, query.dtype)
    scale = problem.case.scale or query.shape[-1] ** -0.5
    return Prepared(lambda: eager(*tensors.values(), bias=bias, scale=scale), tensors, problem.doutput)


def _prepare_flex(problem: Problem, backward: bool) -> Prepared:
    """Compiled flex_attention twice: once over the words with a block mask, once over the prefix."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    tensors, case = leaves(problem), problem.case
    query, key, value, gate = tensors["query"], tensors["key"], tensors["value"], tensors["gate"]
    batch, grouped = query.shape[0], query.shape[1] != key.shape[1]
    ends = problem.arguments.get("key_end")
    if not backward:  # its CPU kernel refuses inputs that require a gradient, even where none is recorded
        query, key, value, gate = (tensor.detach() for tensor in (query, key, value, gate))
    prefix = [tensors[name] if backward else tensors[name].detach() for name in ("prefix_key", "prefix_value")]
    block_mask = None
    if ends is not None:
        block_mask = create_block_mask(
            lambda b, h, q, k: k < ends[b], batch, None, case.seq_q, case.seq_k, device=query.device
        )
    elif case.is_causal and case.seq_q > 1:
        block_mask = create_block_mask(
            lambda b, h, q, k: q >= k, None, None, case.seq_q, case.seq_k, device=query.device
        )

    def both(query: Tensor, key: Tensor, value: Tensor, *prefix: Tensor) -> tuple[Tensor, Tensor]:
        words = flex_attention(query, key, value, block_mask=block_mask, scale=case.scale, enable_gqa=grouped)
        expanded = (tensor.expand(batch, -1, -1, -1).contiguous() for tensor in prefix)
        return words, flex_attention(query, *expanded, scale=case.scale, enable_gqa=grouped)

    # Every shape compiles the same function again, and after eight of them torch runs it uncompiled with nothing but a
    # warning. So those of earlier races are forgotten, and where it happens all the same this fails.
    torch.compiler.reset()
    compiled = torch.compile(both, dynamic=False, fullgraph=True)

    def call() -> Tensor:
        words, adapted = compiled(query, key, value, *prefix)
        # Not compiled with the rest: some of its CPU kernels refuse this as an epilogue.
        return torch.addcmul(words, gate.to(words.dtype)[:, None, None], adapted)

    return Prepared(call, tensors, problem.doutput)


def prepare_ours(backend: str, problem: Problem, backward: bool) -> Prepared:
    return Prepared(lambda: problem.forward(backend), leaves(problem), problem.doutput)


def _prepare_ours_decode(backend: str, problem: Problem, backward: bool) -> Prepared:
    tensors = tuple(tensor if tensor is None else tensor.detach() for tensor in problem.tensors.values())
    query, key_cache, value_cache, *prefix = tensors
    lengths = problem.arguments.get("key_end")
    call = partial(zero_gate_decode, query, key_cache, value_cache, lengths, *prefix, backend=backend)
    return Prepared(call, leaves(problem), problem.doutput)


def sdpa_reason(backend: str, problem: Problem, backward: bool) -> str | None:
    query = problem.tensors["query"]
    assert query is not None
    if query.device.type == "cpu" and backend == "flash":
        return "on the CPU it is what two-sdpa runs anyway"
    if query.device.type == "cpu" and backend in ("cudnn", "efficient"):
        return f"scaled_dot_product_attention has no {backend} kernel for the CPU"
    return None


def _flex_reason(problem: Problem, backward: bool) -> str | None:
    query = problem.tensors["query"]
    assert query is not None
    if backward and query.device.type == "cpu":
        return "flex_attention has no backward on the CPU"
    return None


def flex_on_gpu_reason(problem: Problem, backward: bool) -> str | None:
    query = problem.tensors["query"]
    assert query is not None
    if query.device.type == "cpu":
        return "compiled anew for every shape, half a minute on a CPU; there it takes part in whole-sequence cases"
    return None


def _ours_reason(backend: str, problem: Problem, backward: bool) -> str | None:
    query = problem.tensors["query"]
    assert query is not None
    return backends.unavailable_reason(backend, query.device) or backends.unsupported_reason(backend, query)


def _kind(backend: str) -> str:
    return "definition" if backend == "reference" else "fused"


def ours(prepare: Callable[[str, Problem, bool], Prepared]) -> list[Peer[Problem]]:
    """Every backend of this package, with the prefix and without."""
    return [
        Peer(f"ours-{backend}{'' if prefix else '-p0'}", f"{_kind(backend)} ({backend}{'' if prefix else ', no prefix'})",
             partial(prepare, backend), prefix=prefix, ours=True, quick=backend != "reference",
             products=backend == "reference",
             reason=partial(_ours_reason, backend))
        for backend in backends.BACKENDS for prefix in (True, False)
    ]  # fmt: skip


def _prepare_tile(keys: int, problem: Problem, backward: bool) -> Prepared:
    query = problem.tensors["query"]
    assert query is not None
    capability = torch.cuda.get_device_capability(query.device)

    def call() -> Tensor:
        with cuda_tiles.forward_keys(capability, keys):
            return problem.forward("cuda")

    return Prepared(call, leaves(problem), problem.doutput)


def _tile_reason(problem: Problem, backward: bool) -> str | None:
    query = problem.tensors["query"]
    assert query is not None
    reason = _ours_reason("cuda", problem, backward)
    if reason is None and (backward or query.dtype == torch.float32 or not 64 < query.shape[-1] <= 128):
        return "two tiles are there for forward, 16 bits and head_dim 65 to 128"
    return reason


# Which of them won is for `bench --record-order`.
TILES: list[Peer[Problem]] = [
    Peer(f"ours-cuda-{keys}-keys", f"fused (cuda, tiles of {keys} keys)", partial(_prepare_tile, keys), ours=True,
         quick=True, reason=_tile_reason)
    for keys in cuda_tiles.KEYS
]  # fmt: skip


_SDPA: list[Peer[Problem]] = [
    Peer("sdpa", "plain SDPA, no prefix", partial(_prepare_sdpa, None), prefix=False, quick=True),
    Peer("two-sdpa", "two SDPA calls", partial(_prepare_sdpa, None), quick=True),
    *(
        Peer(f"two-sdpa-{name}", f"two SDPA calls ({name})", partial(_prepare_sdpa, backend),
             products=name == "math", reason=partial(sdpa_reason, name))
        for name, backend in SDPA_BACKENDS.items()
    ),
]  # fmt: skip
_EAGER: list[Peer[Problem]] = [Peer("eager", "eager, concatenated", _prepare_eager, products=True, quick=True)]

ATTENTION = [*_SDPA, *_EAGER, Peer("flex", "flex_attention twice", _prepare_flex, reason=_flex_reason),
             *ours(prepare_ours), *TILES]  # fmt: skip
_ROWS: list[Peer[Problem]] = [
    Peer("sdpa-rows", "plain SDPA, group as rows, no prefix", _prepare_sdpa_rows, prefix=False, reason=_rows_reason),
    Peer("two-sdpa-rows", "two SDPA calls, group as rows", _prepare_sdpa_rows, quick=True, reason=_rows_reason),
]  # fmt: skip
DECODE = [*_SDPA, *_ROWS, *_EAGER,
          Peer("flex", "flex_attention twice", _prepare_flex, reason=flex_on_gpu_reason),
          *ours(_prepare_ours_decode)]  # fmt: skip
