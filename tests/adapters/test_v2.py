"""V2's tuning as part of an adapter: nothing at first, trained, saved, loaded, chosen and taken away again."""

import copy
import io
from pathlib import Path

import pytest
import torch
from torch import nn

import llama_adapter_kernels as lak
from llama_adapter_kernels.adapters.v2 import TunedLinear
from llama_adapter_kernels.integrations.tuning import TUNING
from tests.support.small_models import TOKENS, build
from tests.support.v2_adapters import OTHERS, V2, v2


def loaded_again(adapter: lak.ZeroGateAdapter, expected: torch.Tensor, folder: Path) -> nn.Module:
    """A new model with the adapter from its files, which computes the same to the bit."""
    adapter.save_pretrained(folder)
    model = build()
    lak.load_adapter(model, folder)
    assert torch.equal(model(TOKENS).logits, expected)
    return model


@pytest.mark.parametrize("name", ["llama", "llama multi-head with biases", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_at_first_it_is_the_base_model_to_the_bit(name: str, dtype: torch.dtype) -> None:
    model = build(name, dtype)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    expected, loss = model(TOKENS, labels=TOKENS).logits, model(TOKENS, labels=TOKENS).loss
    lak.attach_adapter(model, lak.AdapterConfig(prefix_length=4))
    plain = model(TOKENS, labels=TOKENS).logits  # what the operation gives where sdpa gave `expected`
    assert (plain.float() - expected.float()).abs().max() < 0.02
    lak.detach_adapter(model)
    for tuning in (V2.tuning, *OTHERS.values()):
        config = lak.AdapterConfig(prefix_length=4, tuning=tuning)
        adapter = v2(model, opened=False, config=config)
        found = model(TOKENS, labels=TOKENS)
        assert torch.equal(found.logits, plain)
        with torch.no_grad():
            assert torch.equal(model(TOKENS).logits, plain)
        assert {parameter.dtype for parameter in adapter.parameters()} == {torch.float32}
        lak.detach_adapter(model)
    assert (found.loss - loss).abs() < 0.02
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_what_is_tuned_can_be_counted() -> None:
    model = build()  # 3 layers, hidden 48, feed-forward 64, 4 heads of 12, 2 of them for keys
    adapter = v2(model)
    sizes = {
        "q": (48, 48),
        "k": (48, 24),
        "v": (48, 24),
        "o": (48, 48),
        "gate": (48, 64),
        "up": (48, 64),
        "down": (64, 48),
    }
    linears = sum(out + inp + 3 * (inp + out) for inp, out in sizes.values())
    assert adapter.num_parameters() == 2 * (4 * 48 + 4 + 1) + 3 * (linears + 2 * 48) + 48
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == adapter.num_parameters()
    names = dict(adapter.named_parameters())
    assert {"layers.1.new_gate", "tuning.layers.0.self_attn.q_proj.lora_b", "tuning.norm.weight"} <= names.keys()


def test_every_parameter_learns_and_comes_back(tmp_path: Path) -> None:
    model = build()
    base = {name: parameter.clone() for name, parameter in model.named_parameters()}
    adapter = v2(model, opened=False)
    with torch.no_grad():  # at 0 the gate gives prompts no gradient, and lora_b lora_a none
        for name, parameter in adapter.named_parameters():
            if name.endswith((".gate", "lora_b")):
                parameter += 0.1 * torch.randn_like(parameter)
    start = {name: parameter.clone() for name, parameter in adapter.named_parameters()}
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.01)
    losses = []
    model.train()
    for _ in range(8):
        loss = model(TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert all(not torch.equal(parameter, start[name]) for name, parameter in adapter.named_parameters())
    assert all(torch.equal(parameter, base[name]) for name, parameter in model.named_parameters() if name in base)
    model.eval()
    expected = model(TOKENS).logits
    assert lak.attached_adapters(loaded_again(adapter, expected, tmp_path))["default"].config == adapter.config


@pytest.mark.parametrize("tuning", OTHERS.values(), ids=OTHERS)
def test_other_choices_come_back_too(tmp_path: Path, tuning: lak.Tuning) -> None:
    model = build()
    plain = model(TOKENS).logits
    adapter = v2(model, config=lak.AdapterConfig(prefix_length=4, num_layers=2, tuning=tuning))
    expected = model(TOKENS).logits
    assert (expected - plain).abs().max() > 0.01
    other = loaded_again(adapter, expected, tmp_path)
    lak.detach_adapter(other)
    assert torch.equal(other(TOKENS).logits, plain)


def test_tuning_alone_without_prompts(tmp_path: Path) -> None:
    model = build()
    plain = model(TOKENS).logits
    adapter = v2(model, config=lak.AdapterConfig(prefix_length=0, tuning=OTHERS["outputs"]))
    assert len(adapter.layers) == 0
    expected = model(TOKENS).logits
    assert (expected - plain).abs().max() > 0.01
    loaded_again(adapter, expected, tmp_path)


def test_prompts_bypass_the_tuning_or_do_not() -> None:
    results = {}
    for prompts in ("base", "tuned"):
        torch.manual_seed(5)
        tuning = lak.Tuning(
            bias=("k_proj", "v_proj"), scale="none", norms=False, lora_rank=0, new_gate=False, prompts=prompts
        )
        model = build()
        adapter = v2(model, config=lak.AdapterConfig(prefix_length=1, tuning=tuning))
        with torch.no_grad():
            for layer in adapter.layers.values():
                layer.gate.fill_(1.0)
            for name, parameter in adapter.named_parameters():
                if name.endswith("k_proj.bias"):
                    parameter.zero_()
            # With one prompt the prefix adds gate * value, whatever the query is: the bias of v_proj shows or does not.
            results[prompts] = model(TOKENS).logits
            for layer in model.model.layers:
                bias = layer.self_attn.v_proj._modules[TUNING]._modules["default"].bias
                layer.self_attn.o_proj.bias = nn.Parameter(
                    layer.self_attn.o_proj.weight
                    @ (torch.tanh(torch.ones(())) * bias).view(2, 12).repeat_interleave(2, 0).flatten()
                )
            results[f"{prompts} and more"] = model(TOKENS).logits
    assert (results["base"] - results["tuned"]).abs().max() > 0.01
    assert torch.allclose(results["base and more"], results["tuned"], atol=1e-5)


def test_one_of_several_adapters_runs() -> None:
    model = build()
    first = v2(model, "first")
    results = {"first": model(TOKENS).logits}
    v2(model, "second", config=lak.AdapterConfig(prefix_length=2, tuning=OTHERS["outputs"]))
    v2(model, "third", config=lak.AdapterConfig(prefix_length=3))
    assert torch.equal(model(TOKENS).logits, results["first"])
    for name in ("second", "third", None, "first"):
        lak.set_adapter(model, name)
        found = model(TOKENS).logits
        assert all(other == name or not torch.equal(found, value) for other, value in results.items())
        results[str(name)] = found
    lak.set_adapter(model, "third")
    with lak.adapters_per_sequence(model, ["first", "first"]):
        assert torch.allclose(model(TOKENS).logits, results["first"], atol=1e-5)
    conditions = [torch.zeros(4, 48), torch.zeros(4, 48)]
    with lak.adapters_per_sequence(model, ["first", "first"], conditions=conditions):
        assert torch.allclose(model(TOKENS).logits, results["first"], atol=1e-5)
    with lak.adapters_per_sequence(model, ["third", None]):
        mixed = model(TOKENS).logits
    assert torch.allclose(mixed[0], results["third"][0], atol=1e-5) and torch.allclose(
        mixed[1], results["None"][1], atol=1e-5
    )
    for names in (["first", "third"], ["third", "first"], ["first", None], ["first", "second"]):
        message = "tunes the model itself, so all sequences of a batch use it; got 2"
        with pytest.raises(ValueError, match=message), lak.adapters_per_sequence(model, names):
            pass
    lak.set_adapter(model, None)
    lak.detach_adapter(model, "first")
    assert first.attachment is None
    lak.set_adapter(model, "second")
    assert torch.equal(model(TOKENS).logits, results["second"])


def test_nothing_is_left_of_it() -> None:
    model = build()
    modules, plain = [name for name, _ in model.named_modules()], model(TOKENS).logits
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    v2(model, "first", config=lak.AdapterConfig(prefix_length=4, tuning=OTHERS["outputs"]))
    v2(model, "second")
    lak.set_adapter(model, None)
    assert torch.equal(model(TOKENS).logits, model(TOKENS).logits)
    lak.detach_adapter(model, "first")
    lak.detach_adapter(model, "second")
    assert [name for name, _ in model.named_modules()] == modules
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == hooks
    assert torch.equal(model(TOKENS).logits, plain)


@pytest.mark.parametrize("reentrant", [False, True])
def test_layers_that_run_again_use_the_same_adapter(reentrant: bool) -> None:
    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        torch.manual_seed(1)
        model = build()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        adapter = v2(model, "first")
        v2(model, "other")
        model.train()
        lak.set_adapter(model, "other")
        adapter.requires_grad_(True)
        with lak.adapters_per_sequence(model, ["first", "first"]):
            loss = model(TOKENS, labels=TOKENS).loss
        loss.backward()  # after the block: layers of the checkpointed model run again here
        lak.set_adapter(model, None)
        lak.detach_adapter(model, "first")
        lak.detach_adapter(model, "other")
        assert not any("Carrying" in str(layer.__dict__) for layer in model.model.layers)
        return {name: parameter.grad for name, parameter in adapter.named_parameters()}

    plain, again = gradients(False), gradients(True)
    assert all(gradient is not None for gradient in plain.values())
    for name, gradient in plain.items():
        assert torch.allclose(again[name], gradient, atol=1e-6), name


def test_copies_and_pickles_have_adapters_of_their_own() -> None:
    model = build()
    v2(model)
    expected = model(TOKENS).logits
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    for other in (copy.deepcopy(model), torch.load(stream, weights_only=False)):
        assert torch.equal(other(TOKENS).logits, expected)
        with torch.no_grad():
            for parameter in lak.attached_adapters(other)["default"].parameters():
                parameter.zero_()
        assert not torch.equal(other(TOKENS).logits, expected)
        lak.detach_adapter(other)
        assert all(TUNING not in module._modules for module in other.modules())
    assert torch.equal(model(TOKENS).logits, expected)


def test_generation_and_frozen_prefixes() -> None:
    model = build()
    adapter = v2(model)
    ids = TOKENS[:, :5]
    plain = model.generate(ids, max_new_tokens=8, do_sample=False, use_cache=False)
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), plain)
    adapter.freeze_prefix()
    for _ in range(2):
        assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), plain)


def test_half_precision_models_keep_float32_tuning() -> None:
    model = build(dtype=torch.float32)
    adapter = v2(model)
    expected = model(TOKENS).logits
    model.to(torch.bfloat16)
    assert {parameter.dtype for parameter in adapter.parameters()} == {torch.float32}
    assert model(TOKENS).logits.dtype == torch.bfloat16
    assert (model(TOKENS).logits.float() - expected).abs().max() < 0.1 * expected.abs().max()


def test_compiled_without_a_graph_break() -> None:
    model = build()
    v2(model)
    with torch.no_grad():
        expected = model(TOKENS).logits
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert torch.allclose(compiled(TOKENS).logits, expected, atol=1e-5)


def test_tuned_linear_by_hand() -> None:
    x, w = torch.randn(2, 3, 5), torch.randn(4, 5)
    shapes = {"bias": (4,), "lora_a": (2, 5), "lora_b": (4, 2)}
    for scales_inputs, size in ((True, 5), (False, 4)):
        part = TunedLinear(shapes | {"scale": (size,)}, scales_inputs, torch.device("cpu"))
        with torch.no_grad():
            for parameter in part.parameters():
                parameter.copy_(torch.randn_like(parameter))
        changed = w + part.lora_b @ part.lora_a
        if scales_inputs:
            scaled = part(x)
            found, expected = part(scaled, scaled @ w.T), (x * part.scale) @ changed.T + part.bias
        else:
            found, expected = part(x, x @ w.T), part.scale * (x @ changed.T + part.bias)
        assert torch.allclose(found, expected, atol=1e-5)
