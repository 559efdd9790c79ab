"""Adapters of the official projects: logits equal an eager model written from their conventions, with open gates."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import llama_adapter_kernels as lak
from tests.support.eager_llama import HIDDEN, TOKENS, Eager, small_llama, weights_of_meta
from tests.support.wild_adapters import imported, v1_file


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return small_llama()


@torch.no_grad()
def same(model: nn.Module, path: Path, expected: Tensor, **choices: object) -> lak.ZeroGateAdapter:
    """The imported adapter's logits are these, and other than the base model's, to which it gives way again."""
    base = model(TOKENS).logits
    with imported(model, path, **choices) as adapter:
        found = model(TOKENS).logits
    assert (expected - base).abs().max() > 0.1
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    assert torch.equal(model(TOKENS).logits, base)
    return adapter


def test_the_eager_model_is_the_base_model(model: nn.Module) -> None:
    expected = Eager(weights_of_meta(model), lambda layer: None).logits()
    # transformers rotates and norms in float32, whatever the model's dtype is.
    assert (model(TOKENS).logits - expected).abs().max() < 2e-6 * expected.abs().max()


@pytest.mark.parametrize("gate", [None, "tanh", "identity"])
def test_v1(tmp_path: Path, model: nn.Module, gate: str | None, caplog: pytest.LogCaptureFixture) -> None:
    content = v1_file()
    torch.save(content, tmp_path / "adapter.pth")

    def prefix(layer: int) -> tuple[Tensor, Tensor] | None:
        if layer < 2:
            return None
        raw = content[f"layers.{layer}.attention.gate"]
        prompts = content["adapter_query.weight"].view(2, 5, HIDDEN)[layer - 2]
        return prompts, raw if gate == "identity" else raw.tanh()

    expected = Eager(weights_of_meta(model), prefix).logits()
    with caplog.at_level("INFO", "llama_adapter_kernels"):
        adapter = same(model, tmp_path / "adapter.pth", expected, **({"gate": gate} if gate else {}))
    assert adapter.config.gate == (gate or "tanh")
    said = f"gate activation: {gate or 'tanh'} ({'as chosen' if gate else 'the default'}"
    assert any(said in message for message in caplog.messages)
