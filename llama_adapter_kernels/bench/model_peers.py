"""Contestants for attention modules and whole models: no adapter, two SDPA calls, eager, PEFT and this package."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from llama_adapter_kernels import zero_gate_attention, zero_gate_attention_varlen
from llama_adapter_kernels.adapters.selection import Selection
from llama_adapter_kernels.bench import attention_peers
from llama_adapter_kernels.bench.model_problem import IGNORED, ModelProblem, OneTokenCache, build_model
from llama_adapter_kernels.bench.peer import Peer, Prepared
from llama_adapter_kernels.integrations.slot import ROUTING, Routing
from llama_adapter_kernels.ops import backends

# (query, key, value, prefix_key, prefix_value, gate [Hq], attn_mask, is_causal, scale, kwargs of the model) -> output
Attention = Callable[..., Tensor]


class Prompt(torch.nn.Module):
    """Prompt and gate of one layer. Its keys and values are computed once where no gradient is recorded."""

    def __init__(self, prompt: Tensor, gate: Tensor) -> None:
        super().__init__()
        self.prompt, self.gate = torch.nn.Parameter(prompt.clone()), torch.nn.Parameter(gate.clone())
        self._kept: tuple[Tensor, Tensor] | None = None

    def keys_and_values(self, module: Any) -> tuple[Tensor, Tensor]:
        if torch.is_grad_enabled():
            return self._project(module)
        if self._kept is None:
            self._kept = self._project(module)
        return self._kept

    def _project(self, module: Any) -> tuple[Tensor, Tensor]:
        shape = (1, self.prompt.shape[0], -1, module.head_dim)
        key, value = (projection(self.prompt).view(shape) for projection in (module.k_proj, module.v_proj))
        return key.transpose(1, 2), value.transpose(1, 2)


def _hook(attention: Attention, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
          scaling: float, **more: Any) -> tuple[Tensor, None]:  # fmt: skip
    """transformers' attention interface around one form of the operation."""
    adapter: Prompt | None = getattr(module, "bench_prompt", None)
    prefix_key = prefix_value = gate = None
    if adapter is not None:
        prefix_key, prefix_value = adapter.keys_and_values(module)
        gate = adapter.gate.expand(query.shape[1])
    is_causal = attention_mask is None and query.shape[2] > 1
    output = attention(query, key, value, prefix_key, prefix_value, gate, attention_mask, is_causal, scaling, more)
    return output.transpose(1, 2), None


@cache
def register(name: str, attention: Attention) -> str:
    """Registers an attention function with transformers, which gets the masks of SDPA; returns its name."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(name, partial(_hook, attention))
    AttentionMaskInterface.register(name, sdpa_mask)
    return name


def two_sdpa(*arguments: Any) -> Tensor:
    *tensors, attn_mask, is_causal, scale, _ = arguments
    return attention_peers.two_calls(*tensors, attn_mask=attn_mask, is_causal=is_causal, scale=scale)


def eager(*arguments: Any) -> Tensor:
    *tensors, attn_mask, is_causal, scale, _ = arguments
    query, key = tensors[:2]
    bias = _causal_bias(query.shape[2], key.shape[2], query.dtype, query.device) if is_causal else None
    if attn_mask is not None:
        bias = attention_peers.bias_of(attn_mask, query.dtype)
    return attention_peers.eager(*tensors, bias=bias, scale=scale)


@cache  # the published code makes it once for all layers
def _causal_bias(seq_q: int, seq_k: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    allowed = torch.ones(seq_q, seq_k, dtype=torch.bool, device=device).tril(seq_k - seq_q)
    return attention_peers.bias_of(allowed, dtype)


@cache
def ours(backend: str) -> Attention:
    def attention(query: Tensor, key: Tensor, value: Tensor, prefix_key: Tensor | None, prefix_value: Tensor | None,
                  gate: Tensor | None, attn_mask: Tensor | None, is_causal: bool, scale: float,
                  more: dict[str, Any]) -> Tensor:  # fmt: skip
        if more.get("cu_seq_lens_q") is None:
            return zero_gate_attention(query, key, value, prefix_key, prefix_value, gate, is_causal=is_causal,
                                       scale=scale, attn_mask=attn_mask, backend=backend)  # fmt: skip
        query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        output = zero_gate_attention_varlen(
            query, key, value, prefix_key, prefix_value, gate, cu_seqlens_q=more["cu_seq_lens_q"],
            cu_seqlens_k=more["cu_seq_lens_k"], max_seqlen_q=more["max_length_q"], max_seqlen_k=more["max_length_k"],
            is_causal=True, scale=scale, backend=backend,
        )  # fmt: skip
        return output.transpose(0, 1)[None]

    return attention


def attach(model: Any, problem: ModelProblem) -> dict[str, Tensor]:
    """Gives every layer its prompt; returns the trainable tensors."""
    leaves: dict[str, Tensor] = {}
    for number, layer in enumerate(model.model.layers):
        layer.self_attn.bench_prompt = Prompt(problem.prompts[number], problem.gates[number])
        leaves[f"prompt.{number}"], leaves[f"gate.{number}"] = layer.self_attn.bench_prompt.parameters()
    return leaves


def _prepare_plain(problem: ModelProblem, backward: bool) -> Prepared:
    return finish(build_model(problem, "sdpa"), problem, {})


def _prepare_hook(name: str, attention: Attention, packed: bool, problem: ModelProblem, backward: bool) -> Prepared:
    model = build_model(problem, register(f"bench-{name}", attention))
    return finish(model, problem, attach(model, problem) if problem.prefix else {}, packed)


def _prepare_peft(accelerated: bool, problem: ModelProblem, backward: bool) -> Prepared:
    """PEFT's AdaptionPrompt, the module that users of Hugging Face models have today, as it is or by accelerate_peft."""
    from peft import AdaptionPromptConfig, get_peft_model

    from llama_adapter_kernels import accelerate_peft

    model = build_model(problem, "sdpa")
    length, layers = problem.prompts.shape[1], problem.shape.layers
    config = AdaptionPromptConfig(adapter_len=length, adapter_layers=layers, task_type="CAUSAL_LM")
    wrapped = get_peft_model(model, config)
    if accelerated:
        accelerate_peft(wrapped)
    model = wrapped.base_model.model
    leaves: dict[str, Tensor] = {}
    for number, layer in enumerate(model.model.layers):
        module = layer.self_attn
        with torch.no_grad():
            module.adaption_prompt.copy_(problem.prompts[number][None])
            module.adaption_gate.copy_(problem.gates[number])
        leaves |= {f"prompt.{number}": module.adaption_prompt, f"gate.{number}": module.adaption_gate}
    return finish(model, problem, leaves, kept=_within_generation(problem, None) if accelerated else None)


def _prepare_adapter(packed: bool, problem: ModelProblem, backward: bool) -> Prepared:
    """This package's adapter as users attach it, on the backend that it chooses."""
    from llama_adapter_kernels import AdapterConfig, attach_adapter

    model = build_model(problem, "sdpa")
    config = AdapterConfig(prefix_length=problem.prompts.shape[1], gate="identity", gate_shape="scalar")
    leaves: dict[str, Tensor] = {}
    adapter = attach_adapter(model, config)
    for number, layer in adapter.layers.items():
        with torch.no_grad():
            layer.prompt.copy_(problem.prompts[int(number)])
            layer.gate.copy_(problem.gates[int(number)])
        leaves |= {f"prompt.{number}": layer.prompt, f"gate.{number}": layer.gate}
    return finish(model, problem, leaves, packed, _within_generation(problem, adapter.name))


def _within_generation(problem: ModelProblem, adapter: str | None) -> dict[str, Any] | None:
    """What a model hands down to its attention modules in the middle of a generation, for one token by a module alone."""
    if problem.mode != "forward" or problem.cache is None:
        return None
    return {ROUTING: Routing(Selection((adapter,), whole=True), kept={})}


def finish(
    model: Any,
    problem: ModelProblem,
    leaves: dict[str, Tensor],
    packed: bool = False,
    kept: Mapping[str, Any] | None = None,
) -> Prepared:
    """The call on a model that is set up: its first attention module, the loss of the whole model or its next token.

    Args:
        kept: further arguments of the attention module.
    """
    if problem.mode == "token":
        return _finish_token(model, problem, leaves)
    if problem.mode != "step":
        return _finish_module(model, problem, leaves, kept or {})
    # Right padding needs no mask: what comes after a token does not reach it, and padding has no label.
    batch: dict[str, Any] = _pack(problem) if packed else {"input_ids": problem.tokens}
    labels = _shifted(problem)
    if packed:
        labels = torch.cat([row[:length] for row, length in zip(labels, problem.shape.lengths or (), strict=True)])
    labels = labels.flatten()
    if not leaves:  # nothing to train: the gradient goes down to the embeddings, as through an adapter in every layer
        leaves = {"hidden": model.model.embed_tokens(batch.pop("input_ids")).detach().requires_grad_()}
        batch["inputs_embeds"] = leaves["hidden"]
    count = (labels != IGNORED).sum()

    def loss() -> Tensor:
        logits = model(**batch).logits.flatten(0, 1).float()
        summed = torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
        return summed / count

    return Prepared(loss, leaves, None)


def _finish_module(model: Any, problem: ModelProblem, leaves: dict[str, Tensor], kept: Mapping[str, Any]) -> Prepared:
    shape, module = problem.shape, model.model.layers[0].self_attn
    hidden = problem.hidden.detach().clone().requires_grad_(problem.doutput is not None)
    positions = torch.arange(shape.cached, shape.cached + shape.sequence, device=problem.device)[None]
    arguments = {"position_embeddings": model.model.rotary_emb(hidden, positions), "attention_mask": None, **kept}
    if problem.cache is not None:
        arguments["past_key_values"] = OneTokenCache(problem.cache[0])

    def call() -> Tensor:
        output: Tensor = module(hidden_states=hidden, **arguments)[0]
        return output

    return Prepared(call, {"hidden": hidden} | leaves, problem.doutput)


def _finish_token(model: Any, problem: ModelProblem, leaves: dict[str, Tensor]) -> Prepared:
    from transformers import DynamicCache

    assert problem.cache is not None
    cache = DynamicCache(config=model.config)
    for layer, (key, value) in enumerate(problem.cache):
        cache.update(key, value, layer)

    def call() -> Tensor:
        logits: Tensor = model(input_ids=problem.tokens, past_key_values=cache, use_cache=True).logits
        cache.crop(-1)  # the token that was added: every call does the same
        return logits

    return Prepared(call, leaves, None)


def _shifted(problem: ModelProblem) -> Tensor:
    """The label of a token is the next token; a sequence's last one has none."""
    return torch.nn.functional.pad(problem.labels[:, 1:], (0, 1), value=IGNORED)


def _pack(problem: ModelProblem) -> dict[str, Any]:
    """The batch as one row without padding, as `llama-adapter finetune` feeds it."""
    lengths = problem.shape.lengths or ()
    offsets = torch.tensor([0, *lengths], device=problem.device).cumsum(0).to(torch.int32)
    rows = [row[:length] for row, length in zip(problem.tokens, lengths, strict=True)]
    positions = [torch.arange(length, device=problem.device) for length in lengths]
    return {"input_ids": torch.cat(rows)[None], "position_ids": torch.cat(positions)[None], "cu_seq_lens_q": offsets,
            "cu_seq_lens_k": offsets, "max_length_q": max(lengths), "max_length_k": max(lengths)}  # fmt: skip


def _packed_reason(packed: bool, problem: ModelProblem, backward: bool) -> str | None:
    return "packs sequences of different lengths; this case has none" if packed and problem.mode != "step" else None


def _ours_reason(backend: str, packed: bool, problem: ModelProblem, backward: bool) -> str | None:
    return _packed_reason(packed, problem, backward) or backends.unavailable_reason(backend, problem.device)


_MODEL: list[Peer[ModelProblem]] = [
    Peer("sdpa", "no adapter, plain SDPA", _prepare_plain, prefix=False, quick=True),
    Peer("two-sdpa", "two SDPA calls", partial(_prepare_hook, "two-sdpa", two_sdpa, False), quick=True),
    Peer("eager", "eager, concatenated", partial(_prepare_hook, "eager", eager, False)),
    Peer("peft", "PEFT AdaptionPrompt", partial(_prepare_peft, False), quick=True),
    Peer("peft-accelerated", "PEFT, accelerate_peft", partial(_prepare_peft, True), ours=True, quick=True),
    *(
        Peer(f"ours-adapter{'-packed' if packed else ''}", f"attach_adapter{', packed' if packed else ''}",
             partial(_prepare_adapter, packed), ours=True, quick=True, reason=partial(_packed_reason, packed))
        for packed in (False, True)
    ),
    *(
        Peer(f"ours-{backend}{'-packed' if packed else ''}",
             f"{'definition' if backend == 'reference' else 'fused'} ({backend}{', packed' if packed else ''})",
             partial(_prepare_hook, f"ours-{backend}", ours(backend), packed), ours=True, quick=backend != "reference",
             reason=partial(_ours_reason, backend, packed))
        for packed in (False, True) for backend in backends.BACKENDS if not (packed and backend == "reference")
    ),
    *(
        Peer(f"ours-{backend}-p0", f"fused ({backend}, no prefix)",
             partial(_prepare_hook, f"ours-{backend}", ours(backend), False), prefix=False, ours=True,
             reason=partial(_ours_reason, backend, False))
        for backend in backends.BACKENDS if backend != "reference"
    ),
]  # fmt: skip
# Projections and feed-forward layers are torch's, whoever computes the attention.
MODEL = [replace(peer, products=True) for peer in _MODEL]
