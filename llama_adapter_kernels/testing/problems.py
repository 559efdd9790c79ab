"""Random problems: shapes, forms of the prefix, windows and masks, and the tensors that go with them."""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from llama_adapter_kernels.ops.attention import zero_gate_attention, zero_gate_attention_varlen


@dataclass(frozen=True)
class Case:
    """One problem. `lengths` (pairs of query and key lengths) makes it a packed (varlen) problem."""

    batch: int = 2
    heads_q: int = 4
    heads_kv: int = 2
    seq_q: int = 33
    seq_k: int = 33
    head_dim: int = 32
    prefix_length: int = 10
    prefix: Literal["shared", "sequence", "table", "none"] = "shared"
    gate: Literal["scalar", "head", "prefix"] = "head"
    is_causal: bool = True
    window: Literal["none", "start", "end", "both"] = "none"
    mask: Literal["none", "bool", "float", "row"] = "none"
    layout: Literal["bhsd", "bshd", "padded"] = "bhsd"
    lengths: tuple[tuple[int, int], ...] | None = None
    scale: float | None = None
    seed: int = 0

    @property
    def name(self) -> str:
        default = Case()
        shape = f"b{self.batch}h{self.heads_q}-{self.heads_kv}s{self.seq_q}-{self.seq_k}d{self.head_dim}"
        shape += f"p{self.prefix_length}"
        other = ("prefix", "gate", "is_causal", "window", "mask", "layout", "lengths", "scale", "seed")
        return "_".join([shape, *(f"{f}={getattr(self, f)}" for f in other if getattr(self, f) != getattr(default, f))])


@dataclass
class Problem:
    """Tensors of one case, and the keyword arguments that go with them."""

    case: Case
    tensors: dict[str, Tensor | None]
    arguments: dict[str, Any] = field(default_factory=dict)
    doutput: Tensor | None = None

    def to(self, dtype: torch.dtype, device: str | torch.device = "cpu") -> "Problem":
        """The same values in another dtype (strides kept) as new leaves; the gate stays float32 unless dtype is float64."""

        def convert(name: str, tensor: Tensor | None) -> Tensor | None:
            if tensor is None:
                return None
            target = torch.float32 if name == "gate" and dtype != torch.float64 else dtype
            # Same strides, and NaN between the rows: a padded layout must stay one.
            size = tensor.untyped_storage().nbytes() // tensor.element_size()
            buffer = torch.full((size,), torch.nan, dtype=target, device=device)
            copy = buffer.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).copy_(tensor.detach())
            return copy.requires_grad_(tensor.requires_grad)

        arguments = {
            name: value.to(device) if isinstance(value, Tensor) else value for name, value in self.arguments.items()
        }
        doutput = None if self.doutput is None else self.doutput.to(device=device, dtype=dtype)
        return Problem(self.case, {n: convert(n, t) for n, t in self.tensors.items()}, arguments, doutput)

    def forward(self, backend: str) -> Tensor:
        attention = zero_gate_attention if self.case.lengths is None else zero_gate_attention_varlen
        arguments: dict[str, Any] = {**self.tensors, **self.arguments, "backend": backend}
        return attention(**arguments)

    def backward(self, output: Tensor) -> dict[str, Tensor]:
        """Gradients by name of every tensor that requires one; NaN-free reference for those that got none is zero."""
        wanted = {name: t for name, t in self.tensors.items() if t is not None and t.requires_grad}
        gradients = torch.autograd.grad(output, list(wanted.values()), self.doutput, allow_unused=True)
        return {
            name: torch.zeros_like(wanted[name]) if gradient is None else gradient
            for name, gradient in zip(wanted, gradients, strict=True)
        }


def make_problem(case: Case, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Problem:
    """Random normal inputs, non-zero gates, already rounded to `dtype`; every tensor requires a gradient."""
    generator = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    packed = case.lengths is not None
    batch = len(case.lengths) if case.lengths is not None else case.batch

    def sequence(heads: int, length: int, total: int) -> Tensor:
        if packed:
            tensor = normal(total, heads, case.head_dim)
        elif case.layout == "bhsd":
            tensor = normal(batch, heads, length, case.head_dim)
        elif case.layout == "bshd":  # what a projection followed by transpose(1, 2) gives
            tensor = normal(batch, length, heads, case.head_dim).transpose(1, 2)
        else:  # rows of a larger buffer; what lies between the rows is NaN and must never be used
            buffer = torch.full((batch, heads, length, case.head_dim + 8), torch.nan, dtype=torch.float64)
            tensor = buffer[..., : case.head_dim].copy_(normal(batch, heads, length, case.head_dim))
        return tensor

    total_q, total_k = (sum(pair[i] for pair in case.lengths or ()) for i in (0, 1))
    tensors: dict[str, Tensor | None] = {
        "query": sequence(case.heads_q, case.seq_q, total_q),
        "key": sequence(case.heads_kv, case.seq_k, total_k),
        "value": sequence(case.heads_kv, case.seq_k, total_k),
    }
    count = {"shared": 1, "sequence": batch, "table": 3, "none": 0}[case.prefix]
    arguments: dict[str, Any] = {"is_causal": case.is_causal, "scale": case.scale}
    if case.prefix == "none":
        tensors |= {"prefix_key": None, "prefix_value": None, "gate": None}
    else:
        tensors["prefix_key"] = normal(count, case.heads_kv, case.prefix_length, case.head_dim)
        tensors["prefix_value"] = normal(count, case.heads_kv, case.prefix_length, case.head_dim)
        shape = {"scalar": (), "head": (case.heads_q,), "prefix": (count, case.heads_q)}[case.gate]
        tensors["gate"] = normal(*shape) + 0.5
    if case.prefix == "table":  # -1 first: the sequence without a prefix; entry 2 may stay unused
        arguments["prefix_index"] = torch.tensor([(b % 3) - 1 for b in range(batch)], dtype=torch.int32)
    if packed:
        offsets = torch.tensor([(0, 0), *case.lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)  # type: ignore[misc]
        arguments |= {
            "cu_seqlens_q": offsets[:, 0].contiguous(),
            "cu_seqlens_k": offsets[:, 1].contiguous(),
            "max_seqlen_q": max((pair[0] for pair in case.lengths or ()), default=0),
            "max_seqlen_k": max((pair[1] for pair in case.lengths or ()), default=0),
        }

    def random_int(low: int, high: int) -> Tensor:
        return torch.randint(low, high + 1, (batch,), generator=generator, dtype=torch.int32)

    if case.window in ("end", "both"):
        arguments["key_end"] = random_int(0, case.seq_k)
    if case.window in ("start", "both"):
        arguments["key_start"] = random_int(0, max(case.seq_k // 2, 0))
    full = (batch, case.heads_q, case.seq_q, case.seq_k)
    if case.mask == "bool":
        arguments["attn_mask"] = torch.rand(full, generator=generator) < 0.7
    elif case.mask == "row":  # [B, 1, 1, Sk], some rows of the batch see nothing at all
        arguments["attn_mask"] = torch.rand(batch, 1, 1, case.seq_k, generator=generator) < 0.5
        arguments["attn_mask"][-1] = False
    elif case.mask == "float":
        arguments["attn_mask"] = torch.randn(1, *full[1:], generator=generator)
        arguments["attn_mask"][..., : case.seq_q // 3, :] = -torch.inf  # rows that see nothing
    for tensor in tensors.values():
        if tensor is not None:
            tensor.requires_grad_()
    query = tensors["query"]
    assert query is not None
    doutput = normal(*query.shape)
    return Problem(case, tensors, arguments, doutput).to(dtype).to(dtype, device)
