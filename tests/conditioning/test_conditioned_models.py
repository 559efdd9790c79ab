"""Models that see: conditioned prompts in a batch against each sequence alone, with the prompts written by hand."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import llama_adapter_kernels as lak
from tests.support.small_models import TOKENS, adapted

WIDTH, HIDDEN, SLOTS = 8, 48, 4


def seeing(kind: str = "multi_scale", **sizes: object) -> tuple[nn.Module, lak.ZeroGateAdapter, lak.Conditioning]:
    model, adapter = adapted()
    defaults = {"multi_scale": {"depths": 2}, "queries": {"inner_size": 16, "blocks": 1, "heads": 2}}.get(kind, {})
    conditioning = lak.attach_conditioning(model, kind=kind, width=WIDTH, **{**defaults, **sizes})
    return model, adapter, conditioning


def alone(model: nn.Module, adapter: lak.ZeroGateAdapter, prompts: Tensor | None, tokens: Tensor) -> Tensor:
    """Logits of one sequence, the condition added to the learned prompts by hand. prompts: [P, hidden] or [L, P, hidden]."""
    before = [layer.prompt.detach().clone() for layer in adapter.layers.values()]
    with torch.no_grad():
        if prompts is not None:
            each = prompts if prompts.dim() == 3 else prompts[None].expand(len(before), -1, -1)
            for layer, own, more in zip(adapter.layers.values(), before, each, strict=True):
                layer.prompt.copy_(own + more)
        logits = model(tokens[None]).logits[0]
        for layer, own in zip(adapter.layers.values(), before, strict=True):
            layer.prompt.copy_(own)
    return logits


@pytest.mark.parametrize("fusion", ["all", "early"])
def test_a_mixed_batch_equals_its_sequences_alone(fusion: str) -> None:
    model, adapter, conditioning = seeing(fusion=fusion)
    tokens = torch.randint(3, 90, (4, 12))
    features = [torch.randn(2, WIDTH), None, torch.randn(2, WIDTH), None]
    with torch.no_grad(), conditioning.given(features):
        together = model(tokens).logits
    for b, one in enumerate(features):
        prompts = None if one is None else conditioning(one[None])[0].detach()
        torch.testing.assert_close(together[b], alone(model, adapter, prompts, tokens[b]), atol=2e-5, rtol=1e-4)
    with torch.no_grad():
        assert (together[0] - model(tokens).logits[0]).abs().max() > 1e-3  # and it does make a difference


def test_early_fusion_is_the_first_layers_only_prompt() -> None:
    _, adapter, conditioning = seeing(fusion="early")
    first, *others = adapter.layers.values()
    assert first.prompt.abs().max() == 0
    assert not first.prompt.requires_grad
    assert all(layer.prompt.requires_grad and layer.prompt.abs().max() > 0 for layer in others)
    prompts = conditioning(torch.randn(2, 2, WIDTH))
    assert prompts.shape == (2, 3, SLOTS, HIDDEN)
    assert prompts[:, 1:].abs().max() == 0


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_sees_in_every_step_and_beam(beams: int) -> None:
    model, adapter, conditioning = seeing()
    tokens = torch.randint(3, 90, (2, 7))
    features = [torch.randn(2, WIDTH) * 3, None]
    settings = {"max_new_tokens": 6, "num_beams": beams, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with conditioning.given(features):
        both = model.generate(tokens, **settings)
    for b in range(2):
        with conditioning.given(features[b : b + 1]):
            assert torch.equal(both[b], model.generate(tokens[b : b + 1], **settings)[0])
    # Greedy, step by step without a cache, with the prompts written by hand.
    if beams == 1:
        prompts = conditioning(features[0][None])[0].detach()
        sequence = tokens[0]
        for _ in range(6):
            sequence = torch.cat([sequence, alone(model, adapter, prompts, sequence)[-1].argmax()[None]])
        assert torch.equal(both[0], sequence)


def test_prompts_are_projected_once_per_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, conditioning = seeing()
    calls = []
    forward = conditioning.projection.forward
    monkeypatch.setattr(conditioning.projection, "forward", lambda *a: calls.append(1) or forward(*a))
    projected = []
    key = model.model.layers[0].self_attn.k_proj
    key.register_forward_hook(lambda module, inputs, output: projected.append(inputs[0].shape[1]))
    with conditioning.given([torch.randn(2, WIDTH)]):
        model.generate(TOKENS[:1], max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert len(calls) == 1
    assert projected.count(SLOTS) == 1  # the prefix's keys: in the first step alone


def test_packed_sequences_have_a_condition_each() -> None:
    model, adapter, conditioning = seeing()
    lengths = [5, 9, 4]
    parts = [torch.randint(3, 90, (length,)) for length in lengths]
    features = [torch.randn(2, WIDTH), None, torch.randn(2, WIDTH)]
    offsets = torch.tensor([0, 5, 14, 18], dtype=torch.int32)
    with torch.no_grad(), conditioning.given(features):
        packed = model(
            torch.cat(parts)[None], position_ids=torch.cat([torch.arange(n) for n in lengths])[None],
            cu_seq_lens_q=offsets, cu_seq_lens_k=offsets, max_length_q=9, max_length_k=9,
        ).logits[0]  # fmt: skip
    for part, one, start in zip(parts, features, [0, 5, 14], strict=True):
        prompts = None if one is None else conditioning(one[None])[0].detach()
        expected = alone(model, adapter, prompts, part)
        torch.testing.assert_close(packed[start : start + len(part)], expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["multi_scale", "queries"])
def test_gradients_reach_the_projection_and_the_adapter_alone(kind: str, checkpointing: bool) -> None:
    model, adapter, conditioning = seeing(kind)
    shape = (2, WIDTH) if kind == "multi_scale" else (6, WIDTH)
    features = [torch.randn(shape), torch.randn(shape)]
    model.train()
    results = []
    for checkpoint in (False, checkpointing):
        if checkpoint:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        with conditioning.given(features):
            loss = model(TOKENS, labels=TOKENS).loss
            loss.backward()
        results.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    parameters = [*adapter.parameters(), *conditioning.parameters()]
    assert {id(p) for p in model.parameters() if p.grad is not None} == {id(p) for p in parameters}
    assert all(gradient.abs().max() > 0 for gradient in results[1].values())
    for name, gradient in results[0].items():
        torch.testing.assert_close(results[1][name], gradient)
    # One number by finite differences.
    weight = next(p for n, p in conditioning.named_parameters() if n.endswith("projection.weight"))
    name = next(n for n, p in model.named_parameters() if p is weight)
    model.double()
    losses = []
    for step in (1e-4, -1e-4):
        with torch.no_grad():
            weight[0, 0] += step
            with conditioning.given([f.double() for f in features]):
                logits = model(TOKENS).logits[:, :-1].flatten(0, 1)  # the model's own loss would be float32
                losses.append(nn.functional.cross_entropy(logits, TOKENS[:, 1:].flatten()).item())
            weight[0, 0] -= step
    assert results[0][name][0, 0].item() == pytest.approx((losses[0] - losses[1]) / 2e-4, rel=2e-2, abs=1e-6)


def test_compiled_models_see_without_a_graph_break_or_a_graph_per_image() -> None:
    model, _, conditioning = seeing()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    tokens = torch.randint(3, 90, (2, 8))
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        plain = model(tokens).logits
        torch.testing.assert_close(compiled(tokens).logits, plain)
        for _ in range(10):
            features = [torch.randn(2, WIDTH), torch.randn(2, WIDTH)]
            with conditioning.given(features):
                expected = model(tokens).logits
                torch.testing.assert_close(compiled(tokens).logits, expected)
                assert (expected - plain).abs().max() > 1e-4
        torch.testing.assert_close(compiled(tokens).logits, plain)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


def test_saved_with_the_adapter_and_loaded(tmp_path: Path) -> None:
    model, adapter, conditioning = seeing("queries")
    features = [torch.randn(6, WIDTH), None]
    adapter.save_pretrained(tmp_path)  # what a trainer calls
    with torch.no_grad(), conditioning.given(features):
        expected = model(TOKENS).logits
    other, _ = adapted(opened=0.1)
    lak.detach_adapter(other)
    lak.load_adapter(other, tmp_path)
    loaded = lak.load_conditioning(other, tmp_path)
    assert loaded.config == conditioning.config
    with torch.no_grad(), loaded.given(features):
        assert torch.equal(other(TOKENS).logits, expected)
    lak.detach_adapter(other)
    assert not any("conditioning" in name for name, _ in other.named_modules())


def test_half_precision_models_keep_the_projection_in_float32() -> None:
    model, _, conditioning = seeing()
    model.to(torch.bfloat16)
    assert all(p.dtype == torch.float32 for p in conditioning.parameters())
    with torch.no_grad(), conditioning.given([torch.randn(2, WIDTH), None]):
        assert model(TOKENS).logits.isfinite().all()


def test_what_does_not_fit(tmp_path: Path) -> None:
    model, _ = adapted()
    with pytest.raises(ValueError, match="width: expected that of the features"):
        lak.attach_conditioning(model)
    with pytest.raises(
        ValueError, match=r"adapter 'french': expected one that is attached; this model has \['default'\]"
    ):
        lak.attach_conditioning(model, width=WIDTH, adapter="french")
    conditioning = lak.attach_conditioning(model, width=WIDTH, kind="imagebind", inner_size=8)
    with pytest.raises(ValueError, match="expected one without a conditioning"):
        lak.attach_conditioning(model, width=WIDTH)
    with (
        pytest.raises(ValueError, match="encoder: expected one to compute features with"),
        conditioning.seeing(["a.png"]),
    ):
        pass
    with (
        conditioning.given([torch.randn(WIDTH)] * 3),
        pytest.raises(ValueError, match="2 sequences of the batch, got 3"),
    ):
        model(TOKENS)
    conditioning.save_pretrained(tmp_path)
    other, _ = adapted()
    lak.detach_adapter(other)
    lak.attach_adapter(other, lak.AdapterConfig(prefix_length=7))
    with pytest.raises(ValueError, match="prefix_length: expected 7, the adapter's, got 4"):
        lak.load_conditioning(other, tmp_path)
    with pytest.raises(OSError, match=r"conditioning\.json"):
        lak.load_conditioning(other, tmp_path / "none")
    from llama_adapter_kernels.media.log_mel import LogMel

    fresh, _ = adapted()
    with pytest.raises(ValueError, match="made for an encoder of width 8; log-mel has 64"):
        lak.load_conditioning(fresh, tmp_path, LogMel())
    (tmp_path / "conditioning.safetensors").write_bytes((tmp_path / "adapter.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"conditioning\.safetensors: .*: expected shape"):
        lak.load_conditioning(fresh, tmp_path)
    assert not hasattr(fresh, "zero_gate_conditioning")
    (tmp_path / "conditioning.json").write_text('{"format_version": 1, "conditioning": {"kind": "clip"}}')
    with pytest.raises(ValueError, match=r"conditioning\.json"):
        lak.load_conditioning(fresh, tmp_path)
