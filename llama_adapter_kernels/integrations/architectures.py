"""Models as data: where the attention modules of an architecture are, and how a prompt becomes their prefix."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Heads(NamedTuple):
    """Heads of an attention module: of its queries, of its keys and values, and their width."""

    query: int
    key: int
    head_dim: int


# From an attention module, prompts [N, P, hidden] in the query's dtype and its heads to key and value [N, Hkv, P, D].
Projection = Callable[[Any, Tensor, Heads], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Separate:
    """Key and value from two projections, which may be any modules: linear, quantised, wrapped by LoRA.

    Args:
        key, value: attributes of the attention module.
        key_norm: a norm of the keys, used where the module has it.
        norm_over: "head" (each key of each head, [.., head_dim]) or "width" (all heads of a token together).
    """

    key: str = "k_proj"
    value: str = "v_proj"
    key_norm: str | None = None
    norm_over: str = "head"

    def __call__(self, module: Any, prompts: Tensor, heads: Heads) -> tuple[Tensor, Tensor]:
        key, value = getattr(module, self.key)(prompts), getattr(module, self.value)(prompts)
        norm = getattr(module, self.key_norm, None) if self.key_norm is not None else None
        if norm is not None and self.norm_over == "width":
            key = norm(key)
        key, value = (_by_head(tensor, heads.head_dim) for tensor in (key, value))
        return (norm(key) if norm is not None and self.norm_over == "head" else key), value

    def parts(self) -> tuple[str, ...]:
        """The attributes that an attention module must have."""
        return self.key, self.value


@dataclass(frozen=True)
class Fused:
    """Query, key and value from one projection.

    Args:
        projection: the attribute of the attention module.
        layout: "blocks" (all heads of the query, then of the key, then of the value) or "groups" (for every key head its
            query heads, its key, its value).
        key_norm: a norm of each key of each head, used where the module has it.
    """

    projection: str
    layout: str = "blocks"
    key_norm: str | None = None

    def __call__(self, module: Any, prompts: Tensor, heads: Heads) -> tuple[Tensor, Tensor]:
        fused = getattr(module, self.projection)(prompts)
        width = heads.head_dim
        if self.layout == "blocks":
            _, key, value = fused.split([heads.query * width, heads.key * width, heads.key * width], -1)
        else:
            groups = fused.unflatten(-1, (heads.key, heads.query // heads.key + 2, width))
            key, value = groups[..., -2, :].flatten(-2), groups[..., -1, :].flatten(-2)
        key, value = _by_head(key, width), _by_head(value, width)
        norm = getattr(module, self.key_norm, None) if self.key_norm is not None else None
        return (key if norm is None else norm(key)), value

    def parts(self) -> tuple[str, ...]:
        """The attributes that an attention module must have."""
        return (self.projection,)


def legacy_rows(module: Any, prompts: Tensor, heads: Heads) -> tuple[Tensor, Tensor]:
    """A Projection: key and value from rows of query, key and value projections stacked, as LitGPT from 0.5.5 takes them.

    There the rows of all queries, keys and values follow each other, but prompts are still read as if the heads of every
    group were together. Nothing norms these keys.
    """
    fused = torch.cat([module.q_proj(prompts), module.k_proj(prompts), module.v_proj(prompts)], -1)
    groups = fused.unflatten(-1, (heads.key, heads.query // heads.key + 2, heads.head_dim))
    return groups[..., -2, :].transpose(1, 2), groups[..., -1, :].transpose(1, 2)


def _by_head(tensor: Tensor, head_dim: int) -> Tensor:
    """[N, P, H D] as [N, H, P, D]."""
    return tensor.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def config_heads(config: Any) -> Heads:
    """Heads from a transformers configuration."""
    query = int(config.num_attention_heads)
    key = getattr(config, "num_key_value_heads", None)
    width = getattr(config, "head_dim", None)
    return Heads(
        query, int(query if key is None else key), int(config.hidden_size // query if width is None else width)
    )


@dataclass(frozen=True)
class Architecture:
    """What attaching an adapter has to know about one kind of model.

    Args:
        model_type: as the model's configuration says; the class name for models without one.
        attention: path from the stem to the attention modules, `*` for the layer number: "layers.*.self_attn".
        project: from prompts to prefix key and value, through the module's own projections: Separate, Fused, or any
            function of (attention module, prompts [N, P, hidden], Heads) that returns two tensors [N, Hkv, P, D]. The
            position embedding is left out.
        causal: whether a token sees only those before it.
        stem: path from the base model (the model without its head) to the module whose forward pass the adapters take part
            in; "": the base model.
        heads: from the configuration to Heads.
        refuse: from the configuration to the reason why this model cannot be right, or None.
        compute: for attention modules that do not call transformers' attention interface: a subclass of theirs which
            does. Modules are made instances of it while an adapter is attached.
        keywords: whether keyword arguments of the stem's forward pass reach the attention modules.
        kind: "decoder", "encoder" or "part" (of a model with several); for the documentation.
        example: models of this architecture; for the documentation.
    """

    model_type: str
    attention: str
    project: Projection
    causal: bool
    stem: str = ""
    heads: Callable[[Any], Heads] = config_heads
    refuse: Callable[[Any], str | None] | None = None
    compute: Callable[[], type] | None = None
    keywords: bool = True
    kind: str = "decoder"
    example: str = ""

    def __post_init__(self) -> None:
        if not self.model_type or not isinstance(self.model_type, str):
            raise ValueError(f"model_type: expected a name, got {self.model_type!r}")
        if self.attention.split(".").count("*") != 1:
            raise ValueError(f"attention: expected a path with one * for the layer number, got {self.attention!r}")
        if not callable(self.project):
            raise ValueError(f"project: expected Separate(...), Fused(...) or a function, got {self.project!r}")
