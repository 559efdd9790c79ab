"""Generation with an adapter: every kind of cache and padding gives what full passes without a cache give."""

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

import llama_adapter_kernels as lak
from llama_adapter_kernels.integrations.transformers import attention as transformers_attention
from tests.support.small_models import TOKENS, adapted, build

NEW = 9


def greedy(model: nn.Module, row: Tensor) -> Tensor:
    """NEW tokens for one sequence, a full pass each."""
    row = row[None]
    with torch.no_grad():
        for _ in range(NEW):
            row = torch.cat([row, model(row, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return row[0, -NEW:]


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize(
    "name",
    ["llama", "llama multi-head with biases", "mistral sliding window", "qwen2", "qwen2 sliding layers", "qwen3"],
)
def test_a_left_padded_batch_generates_as_one_by_one(name: str, cache: str) -> None:
    model, _ = adapted(name)
    rows = [TOKENS[0, :11], TOKENS[0, 5:9], TOKENS[0, 2:3]]
    batch = torch.stack([nn.functional.pad(row, (11 - len(row), 0)) for row in rows])
    tokens = model.generate(
        batch, attention_mask=(batch != 0).long(), max_new_tokens=NEW, do_sample=False, cache_implementation=cache,
        eos_token_id=None,
    )  # fmt: skip
    for row, got in zip(rows, tokens, strict=True):
        assert torch.equal(got[-NEW:], greedy(model, row))


def test_decode_steps_run_the_decode_op_and_never_a_mask_over_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = adapted()
    seen: list[tuple[int, Tensor | None]] = []
    original = transformers_attention._decode

    def decode(query: Tensor, *rest: object) -> Tensor:
        seen.append((query.shape[2], None))
        return original(query, *rest)

    def full(query: Tensor, *rest: object, attn_mask: Tensor | None, **more: object) -> Tensor:
        seen.append((query.shape[2], attn_mask))
        return lak.zero_gate_attention(query, *rest, attn_mask=attn_mask, **more)

    monkeypatch.setattr(transformers_attention, "_decode", decode)
    monkeypatch.setattr(transformers_attention, "zero_gate_attention", full)
    batch = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]])
    for cache in ("dynamic", "static"):
        model.generate(batch, attention_mask=(batch != 0).long(), max_new_tokens=4, do_sample=False,
                       cache_implementation=cache, eos_token_id=None)  # fmt: skip
    assert [length for length, _ in seen] == [*[4] * 3, *[1] * 9] * 2
    assert all(mask is None for _, mask in seen)


@pytest.mark.parametrize("name", ["llama", "mistral sliding window"])
def test_a_prompt_in_pieces(name: str) -> None:
    model, _ = adapted(name)
    expected = model(TOKENS, use_cache=False).logits
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        pieces = [model(piece, past_key_values=cache).logits for piece in TOKENS.split([7, 1, 5, 9], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), expected, atol=1e-5, rtol=1e-4)


def test_beam_search_and_sampling_with_and_without_cache() -> None:
    model, _ = adapted()
    tokens = [
        model.generate(
            TOKENS[:, :5], max_new_tokens=6, num_beams=3, do_sample=False, use_cache=use_cache, eos_token_id=None
        )
        for use_cache in (True, False)
    ]
    assert torch.equal(*tokens)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_use_backend_reaches_decode(backend: str) -> None:
    model, _ = adapted()
    with lak.use_backend(backend):
        tokens = model.generate(TOKENS[:1, :5], max_new_tokens=NEW, do_sample=False, eos_token_id=None)
        assert torch.equal(tokens[0, 5:], greedy(model, TOKENS[0, :5]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_decode(dtype: torch.dtype) -> None:
    model = build(dtype=dtype)
    adapter = lak.attach_adapter(model, lak.AdapterConfig(prefix_length=4))
    with torch.no_grad():
        for layer in adapter.layers.values():
            layer.gate.fill_(0.7)
        full = model(TOKENS, use_cache=False).logits
        cache = DynamicCache(config=model.config)
        model(TOKENS[:, :-1], past_key_values=cache)
        step = model(TOKENS[:, -1:], past_key_values=cache).logits
    assert step.dtype == dtype
    tolerance = {torch.float64: 1e-10, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    torch.testing.assert_close(step[:, -1], full[:, -1], atol=tolerance, rtol=tolerance)


def test_generation_of_a_compiled_model_with_a_static_cache() -> None:
    model, _ = adapted()
    eager = model.generate(
        TOKENS[:, :5], max_new_tokens=5, do_sample=False, cache_implementation="static", eos_token_id=None
    )
    model.forward = torch.compile(model.forward, backend="aot_eager", fullgraph=True)
    compiled = model.generate(
        TOKENS[:, :5], max_new_tokens=5, do_sample=False, cache_implementation="static", eos_token_id=None
    )
    assert torch.equal(eager, compiled)
