"""Who takes part in step_on_gpu.py, and how each is put into the model and taken out of it."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

import llama_adapter_kernels as lak
from llama_adapter_kernels.bench import model_peers
from llama_adapter_kernels.training.memory import keep_words_frozen

# hidden, feed-forward, layers, heads, vocabulary, tokens of a step
SHAPES = {
    "7b": (4096, 11008, 32, 32, 32000, 8192),
    "1b": (2048, 5504, 16, 16, 32000, 8192),
    "tiny": (64, 160, 4, 4, 256, 1024),
}
PROMPT_LENGTH, UNADAPTED = 10, 2  # the paper's: prompts of 10 tokens in all layers but the lowest two
TIMED = 5  # steps


@dataclass(frozen=True)
class Contestant:
    """One way to train.

    Attributes:
        backend: of this package's operation; None: not this package's.
        pieces: into how many micro-batches a packed step is dealt.
        low: activations are computed again in the backward pass.
        fused: with liger-kernel's norms, rotations and activations.
        kind: ours, varlen (torch's varlen_attn twice), two-sdpa, lora or adaption-prompt.
    """

    name: str
    kind: str
    backend: str | None = None
    pieces: int = 1
    low: bool = False
    fused: bool = False
    timed: int = TIMED


def contestants(device: str) -> list[Contestant]:
    """The most important first, those that leave traces in the model last."""
    fast = [name for name in lak.available_backends(device) if name != "reference"]
    found = []
    for backend in fast:
        found.append(Contestant(f"ours {backend}", "ours", backend))
        found.append(Contestant(f"ours {backend}, checkpointing", "ours", backend, low=True))
    for pieces in (4, 8):
        found += [Contestant(f"ours {fast[0]}, {pieces} micro-batches", "ours", fast[0], pieces)] if fast else []
    if device == "cuda" and fast and find_spec("liger_kernel"):
        found.append(Contestant(f"ours {fast[0]}, liger", "ours", fast[0], fused=True))
        found.append(Contestant(f"ours {fast[0]}, liger, checkpointing", "ours", fast[0], low=True, fused=True))
        found.append(Contestant(f"ours {fast[0]}, liger, 6 micro-batches", "ours", fast[0], 6, fused=True))
    if device == "cuda":
        found.append(Contestant("varlen_attn twice", "varlen"))
        found.append(Contestant("varlen_attn twice, checkpointing", "varlen", low=True))
    found.append(Contestant("two SDPA calls, padded", "two-sdpa", timed=3))
    found.append(Contestant("PEFT LoRA r8, padded", "lora", timed=3))
    found.append(Contestant("PEFT AdaptionPrompt, padded", "adaption-prompt", timed=3))
    found.append(Contestant("ours reference", "ours", "reference", timed=1))
    return found


def build(shape: tuple[int, ...], device: torch.device) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, inner, layers, heads, vocabulary, _ = shape
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads, vocab_size=vocabulary, max_position_embeddings=2048, tie_word_embeddings=False,
        use_cache=False, attn_implementation="sdpa",
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config).requires_grad_(False).train()
    finally:
        torch.set_default_dtype(before)


def varlen_twice(*arguments: Any) -> Tensor:
    """What torch has for packed sequences, once for the words and once for the prefix."""
    from torch.nn.attention.varlen import varlen_attn

    query, key, value, prefix_key, prefix_value, gate, _, _, scale, more = arguments
    if more.get("cu_seq_lens_q") is None:
        return model_peers.two_sdpa(*arguments)
    offsets, longest = more["cu_seq_lens_q"], more["max_length_q"]
    causal = (
        {"window_size": (-1, 0)} if "window_size" in inspect.signature(varlen_attn).parameters else {"is_causal": True}
    )
    rows, keys, values = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    words = varlen_attn(rows, keys, values, offsets, offsets, longest, longest, scale=scale, **causal)
    if prefix_key is None:
        return words.transpose(0, 1)[None]
    # Every token of every sequence sees the prefix: to that call they are one sequence.
    prefix = torch.nn.functional.scaled_dot_product_attention(query, prefix_key, prefix_value, scale=scale)
    return torch.addcmul(words.transpose(0, 1)[None], gate.to(words.dtype)[None, :, None, None], prefix)


@contextmanager
def prepared(contestant: Contestant, model: Any) -> Iterator[tuple[Any, list[Tensor]]]:
    """Within the context: (the model to call, what it trains)."""
    layers = model.config.num_hidden_layers
    adapted = layers - UNADAPTED
    if contestant.kind == "ours":
        adapter = lak.attach_adapter(model, lak.AdapterConfig(prefix_length=PROMPT_LENGTH, num_layers=adapted))
        with torch.no_grad():
            for layer in adapter.layers.values():
                layer.gate.fill_(0.3)
        try:
            with lak.use_backend(contestant.backend):
                yield model, list(adapter.parameters())
        finally:
            lak.detach_adapter(model)
    elif contestant.kind in ("varlen", "two-sdpa"):
        attention = {"varlen": varlen_twice, "two-sdpa": model_peers.two_sdpa}[contestant.kind]
        model.set_attn_implementation(model_peers.register(f"step-{contestant.kind}", attention))
        weight = model.model.embed_tokens.weight
        trained: list[Tensor] = []
        for layer in model.model.layers[UNADAPTED:]:
            prompt = torch.randn(PROMPT_LENGTH, model.config.hidden_size, device=weight.device, dtype=weight.dtype)
            layer.self_attn.bench_prompt = model_peers.Prompt(prompt, prompt.new_full((1,), 0.3))
            trained += layer.self_attn.bench_prompt.parameters()
        try:
            yield model, trained
        finally:
            for layer in model.model.layers[UNADAPTED:]:
                del layer.self_attn.bench_prompt
            model.set_attn_implementation("sdpa")
    else:
        import peft

        config = (
            peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
            if contestant.kind == "lora"
            else peft.AdaptionPromptConfig(adapter_len=PROMPT_LENGTH, adapter_layers=adapted, task_type="CAUSAL_LM")
        )
        wrapped = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
        wrapped.train()
        try:
            yield wrapped, [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
        finally:
            if contestant.kind == "lora":
                wrapped.unload()
            else:
                for layer in model.model.layers[UNADAPTED:]:
                    layer.self_attn = layer.self_attn.model


@contextmanager
def checkpointing(model: Any, wanted: bool) -> Iterator[None]:
    """Activation checkpointing within the context, by the name that this transformers has for it."""
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if not wanted:
        yield
        return
    getattr(model, f"{name}_checkpointing_enable")(**{f"{name}_checkpointing_kwargs": {"use_reentrant": False}})
    keep_words_frozen(model)
    try:
        yield
    finally:
        getattr(model, f"{name}_checkpointing_disable")()
