"""LLaMA with a zero-gated prefix, written from the conventions of Meta's and Lightning's code: what importers must equal.

Nothing here comes from the package or from transformers. Weights have the names and the order of the project that a file
belongs to; whatever a file changes in the model goes through `linear` and `norm_weight`, its prefix through `prefix`.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

HEADS, LAYERS, HIDDEN, HEAD_DIM, FFN, VOCABULARY, EPSILON, THETA = 4, 4, 32, 8, 48, 64, 1e-5, 10000.0
TOKENS = torch.tensor([[1, 9, 30, 4, 17, 62, 5], [1, 2, 3, 50, 51, 6, 7]])
Weights = dict[str, Tensor]


def small_llama(key_value_heads: int = HEADS) -> nn.Module:
    """A random transformers model in float64 whose attention is far from uniform and whose norms are not 1."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=FFN, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=key_value_heads, rms_norm_eps=EPSILON, max_position_embeddings=64,
        rope_theta=THETA, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(
                1 + 0.2 * torch.randn_like(parameter) if parameter.dim() == 1 else 0.3 * torch.randn_like(parameter)
            )
    return model


def weights_of_meta(model: nn.Module) -> Weights:
    """The weights of a transformers model as Meta has them: other names, rotated pairs side by side."""
    weights = {
        "tok_embeddings": model.model.embed_tokens.weight,
        "output": model.lm_head.weight,
        "norm": model.model.norm.weight,
    }
    for i, layer in enumerate(model.model.layers):
        at = layer.self_attn
        parts = {
            "attention.wq": pairs(at.q_proj.weight), "attention.wk": pairs(at.k_proj.weight),
            "attention.wv": at.v_proj.weight, "attention.wo": at.o_proj.weight,
            "feed_forward.w1": layer.mlp.gate_proj.weight,
            "feed_forward.w2": layer.mlp.down_proj.weight, "feed_forward.w3": layer.mlp.up_proj.weight,
            "attention_norm": layer.input_layernorm.weight, "ffn_norm": layer.post_attention_layernorm.weight,
        }  # fmt: skip
        weights |= {f"layers.{i}.{name}": weight for name, weight in parts.items()}
    return {name: weight.detach() for name, weight in weights.items()}


def pairs(rows: Tensor) -> Tensor:
    """Rows of a head from (x0 x1 .. | y0 y1 ..) to x0 y0 x1 y1 .."""
    heads = rows.shape[0] // HEAD_DIM
    shaped = rows.reshape(heads, 2, HEAD_DIM // 2, *rows.shape[1:])
    return shaped.transpose(1, 2).reshape(rows.shape)


def rotated(x: Tensor) -> Tensor:
    """[B, S, H, D], each pair (2 i, 2 i + 1) turned by position / theta^(2 i / D)."""
    angles = torch.arange(x.shape[1]).double()[:, None] / THETA ** (torch.arange(0, HEAD_DIM, 2).double() / HEAD_DIM)
    turn = torch.polar(torch.ones_like(angles), angles)[None, :, None]
    return torch.view_as_real(torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * turn).flatten(3)


def attend(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
    """Softmax attention of [B, S, H, D] over [B or 1, K, Hkv, D], key-value heads shared by groups of query heads."""
    shared = query.shape[2] // key.shape[2]
    key, value = (x.repeat_interleave(shared, dim=2) for x in (key, value))
    scores = torch.einsum("bshd,bkhd->bhsk", query, key.expand(query.shape[0], -1, -1, -1)) / HEAD_DIM**0.5
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).tril() == 0, float("-inf"))
    return torch.einsum("bhsk,bkhd->bshd", scores.softmax(-1), value.expand(query.shape[0], -1, -1, -1))


class Eager:
    """A forward pass with Meta's weights.

    Args:
        weights: see weights_of_meta.
        linear: (name, input) to output; by default the weight alone.
        norm_weight: name to weight.
        prefix: layer to (prompts [P, C], gate [H] or a number as it multiplies), or None for no prefix.
        prefix_linear: as linear, for prompts.
    """

    def __init__(
        self,
        weights: Weights,
        prefix: Callable[[int], tuple[Tensor, Tensor] | None],
        linear: Callable[[str, Tensor], Tensor] | None = None,
        norm_weight: Callable[[str], Tensor] | None = None,
        prefix_linear: Callable[[str, Tensor], Tensor] | None = None,
    ) -> None:
        self.weights, self.prefix = weights, prefix
        self.linear = linear or self.plain
        self.norm_weight = norm_weight or (lambda name: weights[name])
        self.prefix_linear = prefix_linear or self.plain

    def plain(self, name: str, x: Tensor) -> Tensor:
        return x @ self.weights[name].T

    def norm(self, name: str, x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + EPSILON).sqrt() * self.norm_weight(name)

    def attention(self, layer: int, x: Tensor) -> Tensor:
        name = f"layers.{layer}.attention"
        query, key, value = (self.linear(f"{name}.w{part}", x).unflatten(-1, (-1, HEAD_DIM)) for part in "qkv")
        query = rotated(query)
        out = attend(query, rotated(key), value, causal=True)
        found = self.prefix(layer)
        if found is not None:
            prompts, gate = found
            key, value = self.prefix_rows(name, prompts.double())
            added = attend(query, key[None], value[None], causal=False)
            out = out + gate.double().reshape(-1, 1) * added
        return self.linear(f"{name}.wo", out.flatten(2))

    def prefix_rows(self, name: str, prompts: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [P, Hkv, D] of prompts."""
        key, value = (self.prefix_linear(f"{name}.w{part}", prompts).unflatten(-1, (-1, HEAD_DIM)) for part in "kv")
        return key, value

    @torch.no_grad()
    def logits(self, tokens: Tensor = TOKENS) -> Tensor:
        x = self.weights["tok_embeddings"][tokens]
        for layer in range(LAYERS):
            name = f"layers.{layer}"
            x = x + self.attention(layer, self.norm(f"{name}.attention_norm", x))
            y = self.norm(f"{name}.ffn_norm", x)
            inner = silu(self.linear(f"{name}.feed_forward.w1", y)) * self.linear(f"{name}.feed_forward.w3", y)
            x = x + self.linear(f"{name}.feed_forward.w2", inner)
        return self.linear("output", self.norm("norm", x))
