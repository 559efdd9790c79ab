"""PEFT's modules of AdaptionPrompt, computed by the fused operation.

PEFT runs a layer's attention as it is, projects the tokens once more to queries, attends with them to the prompt, sends the
result through the output projection once more and adds it. Here the attention of the layer itself gets the prompt as its
prefix. The results are PEFT's, oddities included:

    Llama, Mistral    W_o A + b + W_o (g P) + b = W_o (A + g P) + 2 b: a bias of the output projection counts twice
    GPT-2             c_proj(A) + g P: the prompt's part passes by the output projection (and by the dropout behind it)
"""

from typing import Any

from peft.tuners.adaption_prompt import AdaptedAttention, AdaptionPromptModel
from peft.tuners.adaption_prompt.layer import AdaptedAttentionGPT
from torch import Tensor, nn

from llama_adapter_kernels.adapters.table import LayerPrefix
from llama_adapter_kernels.integrations.architectures import config_heads
from llama_adapter_kernels.integrations.registry import find_architecture
from llama_adapter_kernels.integrations.slot import PREFIX, Routing
from llama_adapter_kernels.ops.attention import zero_gate_attention
from llama_adapter_kernels.ops.registration import accumulator_dtype


class FusedAttention(AdaptedAttention):
    """AdaptedAttention of Llama and Mistral: one attention, one set of projections."""

    def forward(self, **kwargs: Any) -> tuple[Any, ...]:
        """Arguments and results as those of the wrapped attention module.

        Raises:
            ValueError: the probabilities of attention are asked for, which never exist as a tensor.
        """
        output, *rest = self.model(**kwargs, **{PREFIX: _Added(self)})
        bias = getattr(self.model.o_proj, "bias", None)
        return (output if bias is None else output + bias, *rest)


class FusedAttentionGPT(AdaptedAttentionGPT):
    """AdaptedAttention of GPT-2: its queries are used twice, not computed twice."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Any, ...]:
        """Arguments and results as those of the wrapped attention module.

        Raises:
            ValueError: as above.
        """
        beside = _Beside(self)
        output, *rest = self.model(hidden_states, **kwargs, **{PREFIX: beside})
        assert beside.output is not None
        return (output + beside.output.transpose(1, 2).flatten(2), *rest)


class FusedAdaptionPrompt(AdaptionPromptModel):
    """AdaptionPromptModel whose further adapters are fused, too."""

    def _create_adapted_attentions(self, config: Any, parents: list[nn.Module]) -> None:
        super()._create_adapted_attentions(config, parents)
        for parent in parents:
            fuse(getattr(parent, config.target_modules))


# What each of PEFT's classes becomes.
FUSED: dict[type, type] = {
    AdaptedAttention: FusedAttention,
    AdaptedAttentionGPT: FusedAttentionGPT,
    AdaptionPromptModel: FusedAdaptionPrompt,
}
_PLAIN = {fused: plain for plain, fused in FUSED.items()}


def fuse(module: nn.Module) -> None:
    """Makes a module of PEFT's the fused one; its parameters and their names stay."""
    _change(module, FUSED[type(module)])


def unfuse(module: nn.Module) -> None:
    """Takes that back."""
    _change(module, _PLAIN[type(module)])


def _change(module: nn.Module, kind: Any) -> None:
    module.__class__ = kind
    if "_old_forward" in module.__dict__:  # accelerate calls the forward pass that it found
        module._old_forward = kind.forward.__get__(module)


class _Added:
    """Gives an attention function the prompt of one of PEFT's modules as its prefix, for one forward pass."""

    __slots__ = ("owner",)

    def __init__(self, owner: Any) -> None:
        self.owner = owner

    def prefix(self, module: Any, query: Tensor, routing: Routing | None, sequences: int) -> LayerPrefix | None:
        """Key and value [1, Hkv, P, D] of the prompt and its gate [1, Hq], kept as long as a generation."""
        kept = None if routing is None else routing.kept
        found = None if kept is None else kept.get(self.owner)
        if found is not None and found.key.dtype == query.dtype:
            return found
        architecture, heads = find_architecture(self.owner.model_type), config_heads(module.config)
        assert architecture is not None
        key, value = architecture.project(module, self.owner.adaption_prompt.to(query.dtype), heads)
        gate = self.owner.adaption_gate.to(accumulator_dtype(query.dtype)).expand(1, heads.query)
        prefix = LayerPrefix(key, value, gate)
        if kept is not None:
            kept[self.owner] = prefix
        return prefix


class _Beside(_Added):
    """The same where PEFT adds the prompt's part behind the output projection: the attention function gets no prefix.

    Attributes:
        output: gate * softmax(scale Q Kp^T) Vp, [B, Hq, S, D], once the attention function has asked.
    """

    __slots__ = ("output",)

    def __init__(self, owner: Any) -> None:
        super().__init__(owner)
        self.output: Tensor | None = None

    def prefix(self, module: Any, query: Tensor, routing: Routing | None, sequences: int) -> None:
        """Computes `output` by a call of the operation that has no words."""
        found = super().prefix(module, query, routing, sequences)
        assert found is not None
        nothing = query.new_empty(query.shape[0], found.key.shape[1], 0, query.shape[3])
        # PEFT scales by head_dim whatever the model does (scale_attn_by_inverse_layer_idx).
        scale = query.shape[3] ** -0.5
        self.output = zero_gate_attention(query, nothing, nothing, found.key, found.value, found.gate, scale=scale)
        return None
