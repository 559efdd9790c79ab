"""Argument checks of the public functions: one place, messages that name the argument, what was expected and what came.

Shapes, dtypes and devices are checked on every call. Values of integer tensors (lengths, offsets, indices) are checked
where reading them costs nothing: on the CPU. On a GPU reading them would stall the stream, so the kernels clamp them
instead, and a prefix_index out of range gives NaN.
"""

import math
import numbers
import operator
from itertools import pairwise
from typing import Any, NoReturn, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_tensors(**tensors: Any) -> None:
    """A number or a list in place of a tensor is named, before it fails somewhere inside; so are tensors without strides."""
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{name}: expected a tensor, got {type(value).__name__}")
        if value.is_nested or value.layout is not torch.strided:
            kind = "a nested tensor" if value.is_nested else f"the layout {value.layout}"
            raise ValueError(f"{name}: expected a dense tensor (torch.strided), got {kind}")


def check_optional_tensors(**tensors: Any) -> None:
    check_tensors(**{name: value for name, value in tensors.items() if value is not None})


def check_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name}: expected True or False, got {_described(value)}")


def count_of(name: str, value: Any) -> int:
    """A number of tokens as an int (a symbolic one while compiling).

    Raises:
        ValueError: not an integer from 0 to 2^63 - 1.
    """
    if isinstance(value, torch.SymInt):
        return cast(int, value)
    try:
        number = -1 if isinstance(value, bool) else operator.index(value)
    except (TypeError, RuntimeError):
        raise ValueError(f"{name}: expected an integer >= 0, got {_described(value)}") from None
    if not 0 <= number < 2**63:
        raise ValueError(f"{name}: expected an integer >= 0, got {_described(value)}")
    return number


def scale_of(value: Any, head_dim: int) -> float:
    """The factor of the scores: 1 / sqrt(head_dim) for None. It takes no gradient, so a tensor may not ask for one.

    Raises:
        ValueError: neither None nor a finite number.
    """
    if value is None:
        return 1.0 / math.sqrt(head_dim) if head_dim > 0 else 1.0
    if isinstance(value, Tensor):
        if value.dim() != 0 or value.is_complex() or torch._C._functorch.is_functorch_wrapped_tensor(value):
            raise ValueError(f"scale: expected a number, got {_described(value)}")
        if value.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "scale: expected a number, got a tensor that requires a gradient; scale has none (multiply query instead)"
            )
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (int, float, numbers.Real, torch.SymInt, torch.SymFloat)):
        raise ValueError(f"scale: expected a number, got {_described(value)}")
    if value != value or value in (math.inf, -math.inf):
        raise ValueError(f"scale: expected a finite number, got {value}")
    return cast(float, value)


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        if value.dim() == 0 and values_are_free_to_read(value):
            return f"a tensor of {value.item()}"
        return f"a tensor of shape {list(value.shape)} and dtype {value.dtype}"
    return repr(value) if value is None or isinstance(value, (bool, int, float, str)) else f"a {type(value).__name__}"


def check_attention(
    query: Tensor, key: Tensor, value: Tensor, rank: int, key_name: str = "key", value_name: str = "value"
) -> None:
    """query [.., Hq, .., D], key and value [.., Hkv, .., D] of the given rank (4 padded, 3 packed)."""
    form = "[B, H, S, D]" if rank == 4 else "[T, H, D]"
    for name, tensor in (("query", query), (key_name, key), (value_name, value)):
        if tensor.dim() != rank:
            raise ValueError(f"{name}: expected {rank} dimensions {form}, got shape {list(tensor.shape)}")
        check_like(name, tensor, query)
    if query.dtype not in FLOATING:
        raise ValueError(f"query: expected float32, bfloat16, float16 or float64, got {query.dtype}")
    if query.shape[-1] == 0:
        raise ValueError(f"query: expected head_dim >= 1, got shape {list(query.shape)}")
    heads_q, heads_kv = query.shape[1], key.shape[1]
    if heads_q == 0:
        raise ValueError(f"query: expected at least one head, got shape {list(query.shape)}")
    if heads_kv == 0 or heads_q % heads_kv != 0:
        raise ValueError(f"{key_name}: expected a number of heads that divides the {heads_q} of query, got {heads_kv}")
    if rank == 4 and key.shape[0] != query.shape[0]:
        raise ValueError(f"{key_name}: expected the batch size {query.shape[0]} of query, got {key.shape[0]}")
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(f"{key_name}: expected the head_dim {query.shape[-1]} of query, got {key.shape[-1]}")
    if value.shape != key.shape:
        raise ValueError(f"{value_name}: expected the shape {list(key.shape)} of {key_name}, got {list(value.shape)}")


def check_like(name: str, tensor: Tensor, query: Tensor) -> None:
    if tensor.dtype != query.dtype:
        raise ValueError(f"{name}: expected the dtype {query.dtype} of query, got {tensor.dtype}")
    if tensor.device != query.device:
        raise ValueError(f"{name}: expected the device {query.device} of query, got {tensor.device}")


def check_prefix(
    query: Tensor,
    key: Tensor,
    prefix_key: Tensor | None,
    prefix_value: Tensor | None,
    gate: Tensor | None,
    prefix_index: Tensor | None,
    batch: int,
) -> None:
    """prefix_key and prefix_value [A, Hkv, P, D]; gate scalar, [Hq] or [A, Hq]; A is 1, batch, or a table's size."""
    if prefix_key is None or prefix_value is None or gate is None:
        if not (prefix_key is None and prefix_value is None and gate is None):
            raise ValueError("prefix_key, prefix_value, gate: expected all three or None for all three")
        if prefix_index is not None:
            raise ValueError("prefix_index: expected a prefix_key to choose from, got None")
        return
    check_like("prefix_key", prefix_key, query)
    check_like("prefix_value", prefix_value, query)
    heads_kv, head_dim = key.shape[1], key.shape[-1]
    if prefix_key.dim() != 4 or prefix_key.shape[1] != heads_kv or prefix_key.shape[3] != head_dim:
        raise ValueError(f"prefix_key: expected shape [A, {heads_kv}, P, {head_dim}], got {list(prefix_key.shape)}")
    if prefix_value.shape != prefix_key.shape:
        raise ValueError(
            f"prefix_value: expected the shape {list(prefix_key.shape)} of prefix_key, got {list(prefix_value.shape)}"
        )
    count = prefix_key.shape[0]
    if prefix_index is None and count not in (1, batch):
        raise ValueError(
            f"prefix_key: expected a first dimension of 1 (shared) or {batch} (one per sequence), got {count}; "
            "to choose from a table pass prefix_index"
        )
    if prefix_index is not None:
        check_integers("prefix_index", prefix_index, batch, query)
        if count == 0:
            raise ValueError("prefix_key: expected at least one entry to choose from, got a first dimension of 0")
    heads_q = query.shape[1]
    if gate.dtype not in FLOATING:
        raise ValueError(f"gate: expected float32, bfloat16, float16 or float64, got {gate.dtype}")
    if gate.device != query.device:
        raise ValueError(f"gate: expected the device {query.device} of query, got {gate.device}")
    if tuple(gate.shape) not in ((), (1,), (heads_q,), (count, heads_q)):
        raise ValueError(
            f"gate: expected a scalar, [{heads_q}] (heads) or [{count}, {heads_q}] (prefixes, heads), "
            f"got shape {list(gate.shape)}"
        )


def check_mask(attn_mask: Tensor | None, query: Tensor, key: Tensor) -> None:
    """Bool or floating, broadcastable to [B, Hq, Sq, Sk], without gradient."""
    if attn_mask is None:
        return
    expected = [*query.shape[:3], key.shape[2]]
    if attn_mask.dtype != torch.bool and attn_mask.dtype not in FLOATING:
        raise ValueError(f"attn_mask: expected bool, float32, bfloat16, float16 or float64, got {attn_mask.dtype}")
    if attn_mask.device != query.device:
        raise ValueError(f"attn_mask: expected the device {query.device} of query, got {attn_mask.device}")
    if attn_mask.requires_grad and torch.is_grad_enabled():
        raise ValueError("attn_mask: expected a mask without gradient, got requires_grad=True")
    shape = list(attn_mask.shape)
    if len(shape) > 4 or any(s not in (1, e) for s, e in zip(reversed(shape), reversed(expected), strict=False)):
        raise ValueError(f"attn_mask: expected a shape that broadcasts to {expected}, got {shape}")


def check_integers(name: str, tensor: Tensor, size: int, query: Tensor) -> None:
    if tensor.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name}: expected int32 or int64, got {tensor.dtype}")
    if tensor.device != query.device:
        raise ValueError(f"{name}: expected the device {query.device} of query, got {tensor.device}")
    if tuple(tensor.shape) != (size,):
        raise ValueError(f"{name}: expected shape [{size}], got {list(tensor.shape)}")


def check_no_tangent(*tensors: Tensor | None) -> None:
    """Forward-mode derivatives: a custom op drops the tangents of its inputs, and the result would look constant."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:  # no forward-mode context: nothing to unpack
        return
    if any(tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        refuse_forward_mode()


def refuse_forward_mode() -> NoReturn:
    raise RuntimeError(
        'zero-gate attention has no forward-mode derivative (jvp); use backend="reference" for one, or backward()'
    )


def values_are_free_to_read(tensor: Tensor) -> bool:
    """On the CPU and real: neither traced by the compiler nor batched by vmap nor a subclass without values."""
    return (
        type(tensor) is Tensor
        and tensor.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


def check_range(name: str, tensor: Tensor | None, low: int, high: int) -> None:
    if tensor is None or not values_are_free_to_read(tensor):
        return
    for position, value in enumerate(tensor.tolist()):
        if not low <= value <= high:
            raise ValueError(f"{name}: expected values from {low} to {high}, got {value} at position {position}")


def check_values(
    key: Tensor,
    prefix_key: Tensor | None,
    key_start: Tensor | None,
    key_end: Tensor | None,
    prefix_index: Tensor | None,
) -> None:
    """Lengths lie in [0, Sk], indices in [-1, A)."""
    check_range("key_start", key_start, 0, key.shape[-2])
    check_range("key_end", key_end, 0, key.shape[-2])
    if prefix_key is not None:
        check_range("prefix_index", prefix_index, -1, prefix_key.shape[0] - 1)


def check_cu_seqlens(cu_seqlens: Tensor, name: str, total: int, longest: int, longest_name: str) -> None:
    """Offsets begin with 0, never decrease, end within the packed tokens; no sequence is longer than said."""
    if not values_are_free_to_read(cu_seqlens):
        return
    offsets = cu_seqlens.tolist()
    if offsets[0] != 0:
        raise ValueError(f"{name}: expected to begin with 0, got {offsets[0]}")
    for b, (begin, end) in enumerate(pairwise(offsets)):
        if end < begin:
            raise ValueError(f"{name}: expected increasing offsets, got {end} after {begin}")
        if end - begin > longest:
            raise ValueError(
                f"{longest_name}: expected at least {end - begin}, the length of sequence {b}, got {longest}"
            )
    if offsets[-1] > total:
        raise ValueError(f"{name}: expected to end within the {total} packed tokens, got {offsets[-1]}")
