"""Kept prefix keys and values are never stale, and are kept where they can be."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import llama_adapter_kernels as lak
from llama_adapter_kernels.adapters.layer import AdapterLayer
from tests.support.small_models import TOKENS, adapted, build


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def fresh(model: nn.Module) -> Tensor:
    for module in model.modules():
        if isinstance(module, AdapterLayer):
            module._cache.clear()
    return logits(model)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one whenever a layer computes its prefix."""
    calls: list[int] = []
    original = AdapterLayer._compute
    monkeypatch.setattr(AdapterLayer, "_compute", lambda *a: calls.append(1) or original(*a))
    return calls


def test_computed_once_for_inference(computed: list[int]) -> None:
    model, _ = adapted()
    for _ in range(3):
        logits(model)
    with torch.inference_mode():
        model(TOKENS)
    model.generate(TOKENS[:, :4], max_new_tokens=5, do_sample=False)
    assert len(computed) == 3
    model.train()
    logits(model)
    assert len(computed) == 6
    model.eval()
    logits(model)
    logits(model)
    assert len(computed) == 9


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def exchange(module: nn.Module, name: str) -> None:
    old = getattr(module, name)
    new = Doubled(old.in_features, old.out_features, bias=old.bias is not None)
    new.load_state_dict(old.state_dict())
    setattr(module, name, new)


def first(model: nn.Module) -> nn.Module:
    return model.model.layers[0].self_attn


CHANGES = {
    "prompt in place": lambda m: first(m).zero_gate.prompt.add_(1),
    "gate in place": lambda m: first(m).zero_gate.gate.add_(1),
    "new prompt": lambda m: setattr(first(m).zero_gate, "prompt", nn.Parameter(torch.ones(4, 48))),
    "gate through .data": lambda m: setattr(first(m).zero_gate.gate, "data", torch.full((4,), -2.0)),
    "k_proj weight": lambda m: first(m).k_proj.weight.mul_(2),
    "v_proj bias": lambda m: first(m).v_proj.bias.add_(1),
    "v_proj exchanged": lambda m: exchange(first(m), "v_proj"),
    "k_proj weight exchanged": lambda m: setattr(first(m).k_proj, "weight", nn.Parameter(first(m).k_proj.weight * 2)),
    "k_proj weight turned, same memory": lambda m: setattr(
        first(m).k_proj, "weight", nn.Parameter(first(m).k_proj.weight.data.T)
    ),
    "v_proj hooked": lambda m: first(m).v_proj.register_forward_hook(lambda mod, args, out: out + 1),
    "forward exchanged": lambda m: setattr(first(m).v_proj, "forward", lambda x: x[..., :48] * 0.5),
    "state dict": lambda m: m.load_state_dict({n: t * 1.5 for n, t in m.state_dict().items()}),
    "optimizer": lambda m: step(m),
    "dtype and back": lambda m: m.to(torch.bfloat16).to(torch.float32),
}


def step(model: nn.Module) -> None:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, 0.1)
    with torch.enable_grad():
        model(TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()


@pytest.mark.parametrize("change", CHANGES)
def test_follows_every_change(change: str) -> None:
    model, _ = adapted("llama multi-head with biases")
    before = logits(model)
    with torch.no_grad():
        CHANGES[change](model)
    after = logits(model)
    assert not torch.equal(before, after)
    assert torch.equal(after, fresh(model))


def test_k_norm_of_qwen3_counts() -> None:
    model, _ = adapted("qwen3")
    logits(model)
    with torch.no_grad():
        first(model).k_norm.weight.mul_(3)
    assert torch.equal(logits(model), fresh(model))


def test_writes_through_data_count_after_a_training_step_or_a_change_of_mode() -> None:
    """PyTorch does not see them; what comes between an evaluation and the next one makes up for it."""
    model, adapter = adapted()
    logits(model)
    step(model)
    adapter.layers["0"].prompt.data.add_(1)
    assert torch.equal(logits(model), fresh(model))
    adapter.layers["0"].prompt.data.add_(1)
    model.eval()
    assert torch.equal(logits(model), fresh(model))


def test_lora_on_the_projections_with_its_switch() -> None:
    """The switch is no tensor. Prefix keys and values go through LoRA as those of words do."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(build(), LoraConfig(target_modules=["k_proj", "v_proj"], init_lora_weights=False)).eval()
    adapter = lak.attach_adapter(model, lak.AdapterConfig(prefix_length=4))
    with torch.no_grad():
        for layer in adapter.layers.values():
            layer.gate.fill_(1)
    assert {n.rsplit(".", 1)[1] for n, p in model.named_parameters() if p.requires_grad} == {"prompt", "gate"}
    switched_on = logits(model)
    with model.disable_adapter():
        switched_off = logits(model)
        assert torch.equal(switched_off, fresh(model))
    assert not torch.equal(switched_on, switched_off)
    assert torch.equal(logits(model), switched_on)
    lak.detach_adapter(model)
    assert all(p.requires_grad == ("lora" in n) for n, p in model.named_parameters())


def test_copies_do_not_share_what_is_kept() -> None:
    model, adapter = adapted()
    expected = logits(model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            first(copied).zero_gate.prompt.zero_()
        assert not torch.equal(logits(copied), expected)
        assert torch.equal(logits(copied), fresh(copied))
    assert torch.equal(logits(model), expected)
    assert adapter.layers["0"] is first(model).zero_gate


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
