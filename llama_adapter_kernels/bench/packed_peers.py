"""Contestants for sequences of different lengths: padding them, looping over them, torch's varlen attention."""

from functools import partial

import torch
from torch import Tensor

from llama_adapter_kernels import testing
from llama_adapter_kernels.bench import attention_peers
from llama_adapter_kernels.bench.attention_peers import leaves, two_calls
from llama_adapter_kernels.bench.lengths import LONGEST
from llama_adapter_kernels.bench.peer import Peer, Prepared
from llama_adapter_kernels.testing import Problem

_PACKED = ("query", "key", "value")


def _lengths(problem: Problem) -> list[int]:
    assert problem.case.lengths is not None
    return [pair[0] for pair in problem.case.lengths]


def padded(problem: Problem, longest: int) -> tuple[Problem, Tensor]:
    """The same sequences right-padded with zeros to [B, H, longest, D], and the bool [B, longest] of the tokens in it.

    Causal attention over them needs no mask: padding comes after every token that counts.
    """
    lengths = _lengths(problem)
    query = problem.tensors["query"]
    assert query is not None
    valid = torch.arange(longest, device=query.device) < torch.tensor(lengths, device=query.device)[:, None]

    def pad(tensor: Tensor) -> Tensor:
        buffer = tensor.new_zeros(len(lengths), longest, *tensor.shape[1:])
        buffer[valid] = tensor.detach()
        return buffer.transpose(1, 2)

    tensors = {
        name: pad(tensor).requires_grad_(tensor.requires_grad) if name in _PACKED and tensor is not None else tensor
        for name, tensor in problem.tensors.items()
    }
    case = testing.Case(
        batch=len(lengths), heads_q=problem.case.heads_q, heads_kv=problem.case.heads_kv, seq_q=longest, seq_k=longest,
        head_dim=problem.case.head_dim, prefix_length=problem.case.prefix_length, is_causal=True, layout="bshd",
    )  # fmt: skip
    doutput = None if problem.doutput is None else pad(problem.doutput)
    return Problem(case, tensors, {"is_causal": True}, doutput), valid


def _prepare_padded(peer: str, longest: int | None, problem: Problem, backward: bool) -> Prepared:
    """One of the contestants for padded batches, on the padded batch."""
    batch, valid = padded(problem, longest or max(_lengths(problem)))
    found = {peer.name: peer for peer in attention_peers.ATTENTION}[peer]
    prepared = found.prepare(batch, backward)

    def unpack(name: str, result: Tensor) -> Tensor:
        return result.transpose(1, 2)[valid] if name in ("output", "dquery", "dkey", "dvalue") else result

    return Prepared(prepared.call, prepared.leaves, prepared.doutput, unpack)


def _prepare_loop(problem: Problem, backward: bool) -> Prepared:
    query, key, value, *prefix = problem.tensors.values()
    assert query is not None
    assert key is not None
    assert value is not None
    lengths = _lengths(problem)

    def call() -> Tensor:
        parts = (tensor.transpose(0, 1)[None].split(lengths, dim=2) for tensor in (query, key, value))
        outputs = [
            two_calls(*part, *prefix, attn_mask=None, is_causal=True, scale=problem.case.scale)
            for part in zip(*parts, strict=True)
        ]
        return torch.cat(outputs, dim=2)[0].transpose(0, 1)

    return Prepared(call, leaves(problem), problem.doutput)


def _prepare_varlen_attn(problem: Problem, backward: bool) -> Prepared:
    """torch.nn.attention.varlen twice; the prefix is repeated for every sequence."""
    from torch.nn.attention.varlen import varlen_attn

    tensors = leaves(problem)
    group = problem.case.heads_q // problem.case.heads_kv
    offsets, count = problem.arguments["cu_seqlens_q"], len(_lengths(problem))
    longest, slots = problem.arguments["max_seqlen_q"], problem.case.prefix_length
    prefix_offsets = torch.arange(0, (count + 1) * slots, slots, dtype=torch.int32, device=offsets.device)

    def packed_prefix(tensor: Tensor) -> Tensor:  # [1, H, P, D] -> [B * P, H, D]
        return tensor[0].transpose(0, 1).repeat(count, 1, 1)

    def heads(tensor: Tensor) -> Tensor:
        return tensor.repeat_interleave(group, dim=1) if group > 1 else tensor

    def call() -> Tensor:
        query, key, value = tensors["query"], heads(tensors["key"]), heads(tensors["value"])
        words = varlen_attn(query, key, value, offsets, offsets, longest, longest, window_size=(-1, 0))
        prefix_key, prefix_value = (heads(packed_prefix(tensors[name])) for name in ("prefix_key", "prefix_value"))
        prefix = varlen_attn(query, prefix_key, prefix_value, offsets, prefix_offsets, longest, slots)
        return torch.addcmul(words, tensors["gate"].to(words.dtype)[:, None], prefix)

    return Prepared(call, tensors, problem.doutput)


def _varlen_attn_reason(problem: Problem, backward: bool) -> str | None:
    query = problem.tensors["query"]
    assert query is not None
    return "torch.nn.attention.varlen runs on CUDA only" if query.device.type == "cpu" else None


PACKED: list[Peer[Problem]] = [
    Peer("sdpa", "plain SDPA, padded to the longest, no prefix", partial(_prepare_padded, "sdpa", None), prefix=False,
         quick=True),
    Peer("sdpa-loop", "plain SDPA, one call per sequence, no prefix", _prepare_loop, prefix=False),
    Peer("two-sdpa", "two SDPA calls, padded to the longest", partial(_prepare_padded, "two-sdpa", None), quick=True),
    *(
        Peer(f"two-sdpa-{name}", f"two SDPA calls ({name}), padded to the longest",
             partial(_prepare_padded, f"two-sdpa-{name}", None), products=name == "math",
             reason=partial(attention_peers.sdpa_reason, name))
        for name in attention_peers.SDPA_BACKENDS
    ),
    Peer("two-sdpa-512", "two SDPA calls, padded to 512", partial(_prepare_padded, "two-sdpa", LONGEST)),
    Peer("two-sdpa-loop", "two SDPA calls per sequence", _prepare_loop, quick=True),
    Peer("two-varlen", "torch varlen_attn twice", _prepare_varlen_attn, reason=_varlen_attn_reason),
    Peer("flex", "flex_attention twice, padded to the longest", partial(_prepare_padded, "flex", None),
         reason=attention_peers.flex_on_gpu_reason),
    Peer("eager-512", "eager, concatenated, padded to 512", partial(_prepare_padded, "eager", LONGEST),
         products=True),
    *attention_peers.ours(attention_peers.prepare_ours),
    *attention_peers.TILES,
]  # fmt: skip
