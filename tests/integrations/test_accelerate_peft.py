"""PEFT's AdaptionPrompt on the fused operation: its results, its files, its switches, without its second projections."""

import copy
import pickle
from collections import Counter
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import llama_adapter_kernels as lak
from llama_adapter_kernels.integrations.peft import fused_prompt
from tests.support.peft_models import CONFIGS, base_model, open_gates, prompted
from tests.support.small_models import TOKENS

peft = pytest.importorskip("peft")
PADDED = torch.ones_like(TOKENS)
PADDED[0, :5] = 0


@pytest.fixture(autouse=True)
def precise(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT takes its softmax in float32, which in float64 models hides errors of 1e-7."""
    theirs = import_module("peft.tuners.adaption_prompt.layer")

    def softmax(scores: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
        return scores.softmax(dim, dtype=torch.promote_types(scores.dtype, dtype))

    monkeypatch.setattr(theirs, "F", SimpleNamespace(softmax=softmax))


def logits(model: nn.Module, tokens: Tensor = TOKENS, **more: Any) -> Tensor:
    with torch.no_grad():
        return model(tokens, **more).logits


def gradients(model: nn.Module, **more: Any) -> dict[str, Tensor]:
    model.zero_grad()
    loss = model(TOKENS, labels=TOKENS, **more).loss
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-11) -> None:
    assert (found - expected).abs().max() <= tolerance * max(1.0, expected.abs().max().item())


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("mask", [None, PADDED], ids=["full", "padded"])
def test_outputs_and_gradients_are_those_of_peft(name: str, mask: Tensor | None) -> None:
    model = prompted(name, torch.float64)
    with model.disable_adapter():
        base = logits(model, attention_mask=mask)
    expected, wanted = logits(model, attention_mask=mask), gradients(model, attention_mask=mask)
    assert (expected - base).abs().max() > 0.1
    assert lak.accelerate_peft(model) is model
    real = slice(None) if mask is None else mask.bool()  # what PEFT computes for padding means nothing
    close(logits(model, attention_mask=mask)[real], expected[real])
    found = gradients(model, attention_mask=mask)
    assert found.keys() == wanted.keys()
    assert len(found) == 5
    for key in found:
        close(found[key], wanted[key])
    with model.disable_adapter():
        close(logits(model, attention_mask=mask)[real], base[real])
    lak.restore_peft(model)
    assert torch.equal(logits(model, attention_mask=mask), expected)


@pytest.mark.parametrize("name", ["llama with biases", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_no_worse(name: str, dtype: torch.dtype) -> None:
    model = prompted(name, dtype)
    exact = logits(copy.deepcopy(model).double())
    theirs = (logits(model) - exact).abs().max()
    ours = (logits(lak.accelerate_peft(model)) - exact).abs().max()
    assert ours <= 2 * theirs + 2 * torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("name", ["llama with biases", "mistral sliding window", "gpt2"])
@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=str)
def test_generation_gives_the_same_tokens(name: str, how: dict[str, Any]) -> None:
    model = prompted(name, torch.float64)
    call = {"input_ids": TOKENS, "attention_mask": PADDED, "max_new_tokens": 6, "do_sample": False, **how}
    expected = model.generate(**call)
    assert torch.equal(lak.accelerate_peft(model).generate(**call), expected)


def test_nothing_is_projected_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lak.accelerate_peft(prompted(layers=1))
    calls: Counter[str] = Counter()
    module = model.base_model.model.model.layers[2].self_attn.model
    for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
        getattr(module, part).register_forward_hook(lambda *_, part=part: calls.update([part]))
    gradients(model)
    assert calls == {"q_proj": 1, "k_proj": 2, "v_proj": 2, "o_proj": 1}  # words and, for key and value, the prompt
    calls.clear()
    model.generate(TOKENS, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert calls == {"q_proj": 5, "k_proj": 6, "v_proj": 6, "o_proj": 5}  # the prompt once per generation
    gpt = lak.accelerate_peft(prompted("gpt2", layers=1))
    count: list[int] = []
    gpt.base_model.model.transformer.h[2].attn.model.c_attn.register_forward_hook(lambda *_: count.append(1))
    gpt.generate(TOKENS, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert len(count) == 6


def test_a_prefix_is_never_stale() -> None:
    from transformers import DynamicCache

    model = lak.accelerate_peft(prompted(dtype=torch.float64))
    before = logits(model)
    open_gates(model, 5)
    assert not torch.allclose(logits(model), before)
    model.add_adapter("other", peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=3, adapter_layers=1))
    results = []
    for accelerated in (True, False):  # another adapter in the middle of a generation
        if not accelerated:
            lak.restore_peft(model)
        past = DynamicCache(config=model.config)
        model.set_adapter("default")
        logits(model, TOKENS[:, :9], past_key_values=past)
        model.set_adapter("other")
        open_gates(model, 6)
        results.append(logits(model, TOKENS[:, 9:10], past_key_values=past))
    close(*results)


def test_names_and_files_are_those_of_peft(tmp_path: Path) -> None:
    model = prompted()
    names, expected = list(model.state_dict()), logits(model)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    lak.accelerate_peft(model)
    assert list(model.state_dict()) == names
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trainable
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(base_model(), tmp_path)
    close(logits(loaded), expected, 1e-5)  # PEFT's own code reads what was written
    close(logits(lak.accelerate_peft(loaded)), expected, 1e-5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "adaption_" in name:
                parameter.zero_()
    model.load_adapter(tmp_path, "default")
    close(logits(model), expected, 1e-5)


def test_adapters_come_and_go_and_switch(tmp_path: Path) -> None:
    model = lak.accelerate_peft(prompted(dtype=torch.float64))
    first = logits(model)
    model.add_adapter("other", peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=3, adapter_layers=3))
    close(logits(model), first)
    model.set_adapter("other")
    open_gates(model, 9)
    second = logits(model)
    kinds = {type(m) for m in model.modules() if hasattr(m, "adaption_prompt")}
    assert kinds == {fused_prompt.FusedAttention}  # that of the new adapter, too
    assert not torch.allclose(first, second)
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path / "other", "third")
    with model.disable_adapter():
        base = logits(model)
    close(base, logits(base_model(dtype=torch.float64)))
    for name, expected in (("default", first), ("other", second), ("third", second), ("default", first)):
        model.set_adapter(name)
        close(logits(model), expected)
    model.delete_adapter("default")
    close(logits(model), second)
    lak.restore_peft(model)
    close(logits(model), second)
    assert not [m for m in model.modules() if isinstance(m, fused_prompt.FusedAttention)]
    model.set_adapter("third")  # one that PEFT kept aside meanwhile
    close(logits(model), second)
    assert not [m for m in model.modules() if isinstance(m, fused_prompt.FusedAttention)]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_gradient_checkpointing_copies_and_pickles(name: str) -> None:
    model = lak.accelerate_peft(prompted(name, torch.float64))
    expected = gradients(model)
    again = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    for key, found in gradients(again).items():
        close(found, expected[key])
    lak.restore_peft(again)
    assert again.config._attn_implementation == "sdpa" != model.config._attn_implementation
    again.set_attn_implementation("eager")
    model.train()
    model.gradient_checkpointing_enable()
    for key, found in gradients(model).items():
        close(found, expected[key])


def test_compiles_without_a_break() -> None:
    model = lak.accelerate_peft(prompted("gpt2", torch.float64))
    expected = logits(model)
    close(logits(torch.compile(model, backend="eager", fullgraph=True)), expected)


@pytest.mark.filterwarnings("ignore:attention dropout")
def test_dropout_is_that_of_the_words() -> None:
    model = lak.accelerate_peft(prompted("llama"))
    expected = gradients(model)
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    model.train()
    found = [gradients(model)["loss"] for _ in range(2)]
    assert found[0] != found[1] != expected["loss"]
    model.eval()
    close(gradients(model)["loss"], expected["loss"], 1e-6)


def lora() -> Any:
    return peft.get_peft_model(base_model(), peft.LoraConfig(target_modules=["q_proj"]))


def with_both() -> Any:
    model = base_model()
    lak.attach_adapter(model, lak.AdapterConfig())
    return peft.get_peft_model(model, peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=4, adapter_layers=2))


def another_architecture() -> Any:
    model = prompted()
    model.base_model.model.config.model_type = "qwen2"
    return model


def of_another_class() -> Any:
    model = prompted()
    module = model.base_model.model.model.layers[2].self_attn
    module.__class__ = type("Changed", (type(module),), {})
    return model


def with_probabilities() -> Any:
    model = prompted()
    model.base_model.model.config._attn_implementation = "eager"
    model.base_model.model.config.output_attentions = True
    return model


@pytest.mark.filterwarnings("ignore:attaching an adapter")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lora, "model: expected a PEFT model with AdaptionPrompt, got a PeftModel with LORA"),
        (base_model, "model: expected a PEFT model with AdaptionPrompt, got a LlamaForCausalLM"),
        (lambda: "folder", "model: expected a PEFT model with AdaptionPrompt, got str"),
        (another_architecture, "model: expected one of llama, mistral, gpt2, got qwen2"),
        (of_another_class, "model: expected PEFT's own modules of AdaptionPrompt, got Changed"),
        (with_probabilities, r"config\.output_attentions: expected False"),
        (with_both, "model: expected one without adapters of attach_adapter; lak.detach_adapter"),
        (lambda: lak.accelerate_peft(prompted()), "model: expected one that is not accelerated yet; lak.restore_peft"),
    ],
)  # fmt: skip
def test_what_cannot_be_accelerated_stays_as_it_was(make: Any, message: str) -> None:
    model = make()
    before = [(name, type(module)) for name, module in model.named_modules()] if isinstance(model, nn.Module) else []
    with pytest.raises(ValueError, match=message):
        lak.accelerate_peft(model)
    if before:
        assert [(name, type(module)) for name, module in model.named_modules()] == before
        assert "accelerated yet" in message or "zero_gate_peft" not in str(model.__dict__)


def test_what_an_accelerated_model_refuses() -> None:
    model = prompted()
    with pytest.raises(ValueError, match=r"expected one that lak\.accelerate_peft has changed"):
        lak.restore_peft(model)
    with pytest.raises(ValueError, match="without PEFT's AdaptionPrompt"):
        lak.attach_adapter(model, lak.AdapterConfig())
    lak.accelerate_peft(model)
    with pytest.raises(ValueError, match="without PEFT's AdaptionPrompt"):
        lak.attach_adapter(model, lak.AdapterConfig())
    with pytest.raises(ValueError, match=r"set_attn_implementation: .*lak.restore_peft\(model\) comes first"):
        model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="output_attentions: not supported"):
        model(TOKENS, output_attentions=True)
    with pytest.raises(TypeError, match="prefix_index: unexpected keyword argument"):
        model(TOKENS, prefix_index=3)
    model.base_model.model.config._attn_implementation = "sdpa"
    with pytest.raises(ValueError, match=r"with which the adapter would do nothing; lak.restore_peft"):
        model(TOKENS)
