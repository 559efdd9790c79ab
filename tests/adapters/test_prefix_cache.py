"""Prefix keys and values are never stale: they live no longer than a generation, unless they were frozen by hand."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

import llama_adapter_kernels as lak
from llama_adapter_kernels.integrations.generations import Generation, _mark
from llama_adapter_kernels.integrations.slot import Slot
from tests.support.model_changes import CHANGES, adapter_layer, ema_swap, first, step
from tests.support.small_models import TOKENS, adapted, build


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one whenever a layer computes its prefix."""
    calls: list[int] = []
    original = Slot.forward
    monkeypatch.setattr(Slot, "forward", lambda *a: calls.append(1) or original(*a))
    return calls


def test_computed_once_per_generation(computed: list[int]) -> None:
    model, _ = adapted()
    for _ in range(2):
        model.generate(TOKENS[:, :4], max_new_tokens=5, do_sample=False)
    assert len(computed) == 2 * 3
    with torch.inference_mode():
        model.generate(TOKENS[:, :4], max_new_tokens=5, do_sample=False, num_beams=2)
    assert len(computed) == 3 * 3
    logits(model)
    assert len(computed) == 4 * 3


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_follows_every_change(change: str, cache: str) -> None:
    """Between two calls and between two generations with one cache object, of one and of several tokens."""
    model, _ = adapted("llama multi-head with biases")

    def generation(past: object, tokens: int) -> Tensor:
        past.reset()
        with torch.no_grad():
            model(TOKENS[:, :tokens], past_key_values=past)
            return model(TOKENS[:, tokens : tokens + 1], past_key_values=past).logits

    def cache_of() -> object:
        return DynamicCache(config=model.config) if cache == "dynamic" else StaticCache(model.config, max_cache_len=8)

    past = cache_of()
    before = logits(model), generation(past, 3), generation(past, 1)
    with torch.no_grad():
        CHANGES[change](model)
    after = logits(model), generation(past, 3), generation(past, 1)
    untouched = copy.deepcopy(model)
    expected = logits(untouched), generation(cache_of(), 3), generation(cache_of(), 1)
    for a, b, c in zip(before, after, expected, strict=True):
        assert not torch.equal(a, b)
        assert torch.equal(b, c)


def test_follows_a_change_between_many_tokens_of_one_generation() -> None:
    """Chunks of a long prompt, or drafts of a helper model: cheap beside their tokens, so nothing is kept."""
    model, _ = adapted()
    past = DynamicCache(config=model.config)
    with torch.no_grad():
        model(TOKENS[:, :4], past_key_values=past)
        other = copy.deepcopy(past)
        ema_swap(model)
        plain = build()(TOKENS[:, 4:8], past_key_values=other).logits
        torch.testing.assert_close(model(TOKENS[:, 4:8], past_key_values=past).logits, plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("inference", [True, False])
def test_a_cache_whose_length_lies_on_a_device_is_watched_by_its_version(inference: bool) -> None:
    """Reading the length would stall a GPU. Here the meta device stands for one: it has no values to read at all."""

    class Past:
        def __init__(self) -> None:
            self.length: int | Tensor = 0

        def get_seq_length(self) -> int | Tensor:
            return self.length

    past, generation = Past(), Generation(None)
    generation.mark = _mark(past)
    assert not generation.goes_on(generation.mark)
    with torch.inference_mode(inference):
        past.length = torch.zeros((), dtype=torch.long, device="meta")
        past.length.add_(5)
        if inference:
            assert _mark(past) is None  # no version to watch: nothing is kept
            return
        for _ in range(3):
            mark = _mark(past)
            assert generation.goes_on(mark)
            generation.mark = mark
            past.length.add_(1)
        past.length.zero_()
        assert not generation.goes_on(_mark(past))


def test_what_a_generation_kept_goes_with_its_cache() -> None:
    model, _ = adapted()
    past = DynamicCache(config=model.config)
    with torch.no_grad():
        model(TOKENS[:, :4], past_key_values=past)
    kept = model.model._zero_gate._generations
    assert len(kept) == 1
    del past
    gc.collect()
    assert len(kept) == 0


def test_gpt2_whose_head_passes_tokens_by_position_computes_its_prefix_once(computed: list[int]) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=96, n_positions=64)).eval()
    lak.attach_adapter(model, lak.AdapterConfig(prefix_length=2))
    model.generate(TOKENS, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=95)
    assert len(computed) == 2


def test_training_and_gradients_keep_nothing(computed: list[int]) -> None:
    model, _ = adapted()
    for context in (torch.enable_grad(), torch.no_grad()):
        with context:
            past = DynamicCache(config=model.config)
            model.train(not torch.is_grad_enabled())
            for i in range(3):
                model(TOKENS[:, i : i + 1], past_key_values=past)
    assert len(computed) == 2 * 3 * 3


def test_lora_on_the_projections_with_its_switch() -> None:
    """The switch is no tensor. Prefix keys and values go through LoRA as those of words do."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(build(), LoraConfig(target_modules=["k_proj", "v_proj"], init_lora_weights=False)).eval()
    adapter = lak.attach_adapter(model, lak.AdapterConfig(prefix_length=4), trainable=[])
    with torch.no_grad():
        for layer in adapter.layers.values():
            layer.gate.fill_(1)
    assert {n.rsplit(".", 1)[1] for n, p in model.named_parameters() if p.requires_grad} == {"prompt", "gate"}
    on = logits(model)
    with model.disable_adapter():
        off = logits(model)
    assert not torch.equal(on, off)
    assert torch.equal(logits(model), on)
    lak.detach_adapter(model)
    assert all(p.requires_grad == ("lora" in n) for n, p in model.named_parameters())


def test_copies_do_not_share_anything() -> None:
    model, adapter = adapted()
    expected = logits(model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(copied), expected)
        with torch.no_grad():
            adapter_layer(copied).prompt.zero_()
        assert not torch.equal(logits(copied), expected)
        assert lak.attached_adapters(copied)["default"].layers["0"] is adapter_layer(copied)
        lak.detach_adapter(copied)
        torch.testing.assert_close(logits(copied), logits(build()), atol=1e-5, rtol=1e-5)
    assert torch.equal(logits(model), expected)
    assert adapter.layers["0"] is adapter_layer(model)


# ---- freeze_prefix


def test_a_frozen_prefix_is_computed_once_until_it_is_thawed(computed: list[int]) -> None:
    model, adapter = adapted()
    expected = logits(model)
    projections: list[int] = []
    first(model).k_proj.register_forward_hook(lambda *_: projections.append(1))
    adapter.freeze_prefix()
    for _ in range(3):
        assert torch.equal(logits(model), expected)
    assert len(projections) == 3 + 1
    assert not any(p.requires_grad for p in model.parameters())
    with torch.no_grad():
        ema_swap(model)
    assert torch.equal(logits(model), expected)  # as promised: nothing looks for changes
    adapter.thaw_prefix()
    torch.testing.assert_close(logits(model), logits(build()), atol=1e-5, rtol=1e-5)


def test_a_frozen_prefix_gives_way_to_gradients_and_to_loading(tmp_path: object) -> None:
    model, adapter = adapted()
    adapter.save_pretrained(tmp_path)
    expected = logits(model)
    adapter.freeze_prefix()
    with torch.inference_mode():
        model(TOKENS)
    model(inputs_embeds=model.model.embed_tokens(TOKENS).detach().requires_grad_()).logits.sum().backward()
    with torch.no_grad():
        ema_swap(model)
    lak.set_adapter(model, "default")
    torch.testing.assert_close(logits(model), logits(build()), atol=1e-5, rtol=1e-5)
    step(model)
    adapter.freeze_prefix()
    logits(model)
    from llama_adapter_kernels.formats import native

    adapter.load_tensors(native.read(tmp_path), "saved")
    assert torch.equal(logits(model), expected)


def test_frozen_prefixes_give_way_to_those_used_later() -> None:
    model, adapter = adapted()
    others = {name: lak.attach_adapter(model, lak.AdapterConfig(prefix_length=4), name) for name in ("a", "b")}
    frozen = model.model._zero_gate.frozen
    for one in (adapter, *others.values()):
        one.freeze_prefix()
    for name in ("default", "a", "b", "default"):
        lak.set_adapter(model, name, trainable=False)
        logits(model)
    sizes = frozen.bytes_by_adapter()
    assert list(sizes) == ["a", "b", "default"]
    # 3 layers, key and value of 2 heads, 4 slots, 12 wide, and 4 gates, all of 4 bytes
    assert set(sizes.values()) == {3 * (2 * 2 * 4 * 12 + 4) * 4}
    lak.limit_frozen_prefixes(model, 2 * sizes["a"])
    assert list(frozen.bytes_by_adapter()) == ["b", "default"]
    lak.set_adapter(model, "a", trainable=False)
    expected = logits(model)
    assert list(frozen.bytes_by_adapter()) == ["default", "a"]
    lak.limit_frozen_prefixes(model, 0)
    assert torch.equal(logits(model), expected)
    assert frozen.bytes_by_adapter() == {}
    with pytest.raises(ValueError, match="max_bytes: expected at least 0, an integer, got -1"):
        lak.limit_frozen_prefixes(model, -1)


def test_a_detached_model_is_freed(computed: list[int]) -> None:
    model, adapter = adapted()
    adapter.freeze_prefix()
    model.generate(TOKENS[:, :4], max_new_tokens=3, do_sample=False)
    watched = weakref.ref(first(model).v_proj.weight)
    lak.detach_adapter(model)
    gc.disable()
    try:
        del model
        assert watched() is None  # at once, not at some later collection
    finally:
        gc.enable()
    with pytest.raises(ValueError, match="adapter 'default': expected one that is attached"):
        adapter.freeze_prefix()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_adapter_stays_float32_when_the_model_changes(dtype: torch.dtype) -> None:
    model, adapter = adapted()
    expected = [p.detach().clone() for p in adapter.parameters()]
    model.to(dtype)
    assert first(model).k_proj.weight.dtype == dtype
    assert all(
        torch.equal(p, e) and p.dtype == torch.float32 for p, e in zip(adapter.parameters(), expected, strict=True)
    )
    assert logits(model).dtype == dtype
