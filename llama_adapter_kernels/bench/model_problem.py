"""Inputs of the module and training cases: a random Llama of `transformers`, prompts, gates and data, in any dtype.

Gates are one number per layer and multiply as they are, the form that every contestant has (PEFT has no other).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llama_adapter_kernels.bench.cases import INFERENCE, PREFIX_LENGTH, Mode, ModelShape

IGNORED = -100  # label of a token without loss


@dataclass
class ModelProblem:
    """weights: state dict of the model. prompts [L, P, C], gates [L].

    Module cases: hidden [B, S, C] and doutput like it. Whole models: tokens, labels [B, S]. One token against a cache:
    cache [L, 2, B, Hkv, cached, D].
    """

    shape: ModelShape
    mode: Mode
    weights: dict[str, Tensor]
    prompts: Tensor
    gates: Tensor
    hidden: Tensor
    doutput: Tensor | None
    cache: Tensor | None
    tokens: Tensor
    labels: Tensor
    prefix: bool = True

    @property
    def dtype(self) -> torch.dtype:
        return self.hidden.dtype

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    def to(self, dtype: torch.dtype, device: torch.device | str) -> "ModelProblem":
        def convert(tensor: Tensor) -> Tensor:
            return tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)

        def maybe(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else convert(tensor)

        return ModelProblem(
            self.shape, self.mode, {name: convert(weight) for name, weight in self.weights.items()},
            convert(self.prompts), convert(self.gates), convert(self.hidden), maybe(self.doutput), maybe(self.cache),
            convert(self.tokens), convert(self.labels), self.prefix,
        )  # fmt: skip


class OneTokenCache:
    """A key/value cache that takes the new token's slot again and again, so that every call does the same."""

    def __init__(self, cache: Tensor) -> None:
        room = cache.new_zeros(*cache.shape[:3], 1, cache.shape[4])
        self._keys, self._values = torch.cat((cache, room), dim=3)
        self._cached = cache.shape[3]

    def update(self, key: Tensor, value: Tensor, layer: int, *rest: Any, **more: Any) -> tuple[Tensor, Tensor]:
        self._keys[:, :, self._cached :], self._values[:, :, self._cached :] = key, value
        return self._keys, self._values

    def get_seq_length(self, layer: int = 0) -> int:
        cached: int = self._cached
        return cached


def make_model_problem(shape: ModelShape, mode: Mode, dtype: torch.dtype, device: torch.device) -> ModelProblem:
    """Random weights as transformers initialises them, prompts N(0, 1), non-zero gates, rounded to `dtype`."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        weights = empty_model(shape, mode, "sdpa", None).state_dict()
    batch, sequence = shape.batch, shape.sequence
    hidden = normal(batch, sequence, shape.hidden)
    tokens = torch.randint(0, shape.vocabulary, (batch, sequence), generator=generator)
    labels = tokens.clone()
    for row, length in enumerate(shape.lengths or ()):
        labels[row, length:] = IGNORED
    cached = (shape.layers, 2, batch, shape.heads_kv, shape.cached, shape.head_dim)
    cache = normal(*cached) if shape.cached else None
    problem = ModelProblem(
        shape, mode, weights, normal(shape.layers, PREFIX_LENGTH, shape.hidden), normal(shape.layers) + 0.5, hidden,
        normal(*hidden.shape) if mode == "forward+backward" else None, cache, tokens, labels,
    )  # fmt: skip
    return problem.to(dtype, device)


def empty_model(shape: ModelShape, mode: Mode, attention: str, dtype: torch.dtype | None) -> Any:
    """A LlamaForCausalLM. In module cases its feed-forward part is next to nothing, because it is not run."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=shape.hidden, num_attention_heads=shape.heads_q, num_key_value_heads=shape.heads_kv,
        head_dim=shape.head_dim, num_hidden_layers=shape.layers, vocab_size=shape.vocabulary,
        intermediate_size=shape.inner if mode in ("step", "token") else 64, attn_implementation=attention,
        max_position_embeddings=max(2048, shape.sequence + shape.cached), use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    return model if dtype is None else model.to(dtype)


def build_model(problem: ModelProblem, attention: str) -> Any:
    """The problem's model with frozen weights, for the attention function registered as `attention`."""
    with torch.device("meta"):
        model = empty_model(problem.shape, problem.mode, attention, problem.dtype)
    model.load_state_dict(problem.weights, assign=True)
    # Buffers are not in the state dict: the rotary embedding computes them again on the real device.
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config).to(problem.device)
    # Without gradients it is inference, where an adapter may keep what does not change from token to token.
    return model.requires_grad_(False).train(problem.mode not in INFERENCE)
