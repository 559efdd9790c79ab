"""Frozen models whose weights accelerate keeps elsewhere until a layer runs: in memory, on disk, on several devices."""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from torch import Tensor, nn

import llama_adapter_kernels as lak
from llama_adapter_kernels.training.loss import response_loss
from llama_adapter_kernels.training.packing import pack
from llama_adapter_kernels.training.tokens import Example
from tests.support.small_models import TOKENS, build

# As from_pretrained(device_map=...) leaves a model that is too large for its devices.
PLACES = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu", "model.layers.2": "disk",
          "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk"}  # fmt: skip
WAYS: dict[str, Callable[[nn.Module, Path], object]] = {
    "cpu_offload": lambda model, folder: cpu_offload(model, execution_device="cpu"),
    "disk_offload": lambda model, folder: disk_offload(model, str(folder), execution_device="cpu"),
    "dispatch_model": lambda model, folder: dispatch_model(
        model, PLACES, main_device="cpu", offload_dir=str(folder), force_hooks=True
    ),
}
CONFIG = lak.AdapterConfig(prefix_length=3, num_layers=2)


def trained(model: nn.Module) -> dict[str, Tensor]:
    """Losses and gradients of a step with open gates: a plain batch, then a packed one."""
    torch.manual_seed(1)
    adapter = lak.attach_adapter(model, CONFIG)
    with torch.no_grad():
        for layer in adapter.layers.values():
            layer.gate.fill_(0.7)
    model.train()
    batch = pack([Example(tuple(range(3, 30)), 10), Example(tuple(range(40, 60)), 4)])
    plain, (packed, _) = model(TOKENS, labels=TOKENS).loss, response_loss(model, batch)
    (plain + packed).backward()
    found = {f"d{name}": parameter.grad.clone() for name, parameter in adapter.named_parameters()}
    return {"plain": plain.detach(), "packed": packed.detach(), **found}


@pytest.mark.parametrize("way", WAYS)
def test_an_adapter_trains_in_an_offloaded_model(tmp_path: Path, way: str) -> None:
    expected = trained(build())
    model = build()
    WAYS[way](model, tmp_path / "offloaded")
    assert any(parameter.is_meta for parameter in model.parameters())
    found = trained(model)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
        assert value.norm() > 0


@pytest.mark.parametrize("way", WAYS)
def test_an_optimizer_step_changes_what_the_next_pass_sees(tmp_path: Path, way: str) -> None:
    model = build()
    WAYS[way](model, tmp_path / "offloaded")
    adapter = lak.attach_adapter(model, CONFIG)
    optimizer = torch.optim.SGD(adapter.parameters(), lr=1.0)
    before = model.train()(TOKENS, labels=TOKENS).loss
    before.backward()
    optimizer.step()
    assert model(TOKENS, labels=TOKENS).loss < before
    adapter.save_pretrained(tmp_path / "adapter")
    other = build()
    lak.load_adapter(other, tmp_path / "adapter")
    torch.testing.assert_close(other(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.parametrize("way", ["cpu_offload", "disk_offload"])
def test_an_adapter_offloaded_with_its_model_runs_but_does_not_train(tmp_path: Path, way: str) -> None:
    model = build()
    adapter = lak.attach_adapter(model, CONFIG)
    with torch.no_grad():
        for layer in adapter.layers.values():
            layer.gate.fill_(0.7)
        expected = model(TOKENS).logits
    WAYS[way](model, tmp_path / "offloaded")
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, expected)
    adapter.save_pretrained(tmp_path / "adapter")
    said = "adapter 'default': its parameters were offloaded, .* offload the model first and attach the adapter then"
    with pytest.raises(ValueError, match=said):
        model.train()(TOKENS)
    other = build()
    lak.load_adapter(other, tmp_path / "adapter")
    torch.testing.assert_close(other(TOKENS).logits, expected)


class Partition:
    """Stands in for DeepSpeed's GatheredParameters: within it the parameters are whole."""

    def __init__(self, log: list[str], parameters: list[nn.Parameter]) -> None:
        self.log, self.parameters = log, parameters

    def __enter__(self) -> None:
        for parameter in self.parameters:
            parameter.data = parameter.whole
        self.log.append("gathered")

    def __exit__(self, *_: object) -> None:
        for parameter in self.parameters:
            parameter.data = torch.empty(0)
        self.log.append("released")


def test_parameters_that_zero_3_has_partitioned_are_gathered_and_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for deepspeed; test_zero3.py runs the real one where it is installed."""
    log: list[str] = []
    deepspeed, zero = ModuleType("deepspeed"), ModuleType("deepspeed.zero")
    zero.GatheredParameters = partial(Partition, log)
    deepspeed.zero = zero
    monkeypatch.setitem(sys.modules, "deepspeed", deepspeed)
    monkeypatch.setitem(sys.modules, "deepspeed.zero", zero)
    model = build()
    adapter = lak.attach_adapter(model, CONFIG)
    whole = {name: parameter.detach().clone() for name, parameter in adapter.named_parameters()}
    for number, parameter in enumerate(adapter.parameters()):
        parameter.whole, parameter.ds_id = parameter.data, number
        parameter.data = torch.empty(0)
    adapter.save_pretrained(tmp_path)
    assert log == ["gathered", "released"] * len(whole)
    assert all(parameter.numel() == 0 for parameter in adapter.parameters())
    loaded = lak.load_adapter(build(), tmp_path)
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, whole[name])
