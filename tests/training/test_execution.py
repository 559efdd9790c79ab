"""How a run is carried out: the model card it leaves, and its parts by liger-kernel."""

import importlib.machinery
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

import llama_adapter_kernels as lak
from llama_adapter_kernels.errors import UserError
from llama_adapter_kernels.models import load_model
from llama_adapter_kernels.training.fused_parts import fuse_parts, wants_liger
from llama_adapter_kernels.training.loss import response_loss
from llama_adapter_kernels.training.packing import pack
from llama_adapter_kernels.training.settings import Execution, Settings
from llama_adapter_kernels.training.tokens import Example
from tests.support.runs import SHORT, run
from tests.support.stand_ins import stand_in


def test_the_card_says_what_the_adapter_is(tiny_model: Path, rows_file: Path, tmp_path: Path) -> None:
    settings = replace(SHORT, max_steps=3, eval_fraction=0.2, gate="identity")
    outcome = run(tiny_model, rows_file, tmp_path / "run", settings)
    text = (tmp_path / "run" / "README.md").read_text()
    _, head, body = text.split("---\n", 2)
    assert yaml.safe_load(head)["tags"] == ["llama-adapter", "zero-init-attention"]
    assert f"{outcome.trainable_parameters:,} parameters" in body
    assert f"{outcome.losses[3]:.4f} at step 3" in body
    assert f"held-out loss {min(outcome.held_out_losses.values()):.4f}" in body
    assert "| gate | identity |" in body
    assert str(tmp_path) not in text
    assert str(rows_file.parent) not in text
    assert not json.loads((tmp_path / "run" / "run.json").read_text())["settings"]["v2"]
    assert "lora rank" not in body


def liger(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A stand-in that notes what it is asked to do."""
    calls: list[Any] = []
    patch = stand_in(
        monkeypatch,
        "liger_kernel.transformers.monkey_patch",
        MODEL_TYPE_TO_APPLY_LIGER_FN={"llama": None},
        _apply_liger_kernel_to_instance=lambda **options: calls.append(options),
    )
    stand_in(monkeypatch, "liger_kernel.transformers", monkey_patch=patch)
    stand_in(monkeypatch, "liger_kernel")
    return calls


def test_liger_is_for_gpus_that_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not wants_liger(Settings(), Execution(), gpu)
    with pytest.raises(UserError, match=r"--liger: liger-kernel is not installed: pip install .*\[gpu\]"):
        wants_liger(Settings(), Execution(liger=True), gpu)
    monkeypatch.undo()
    liger(monkeypatch)
    assert wants_liger(Settings(), Execution(), gpu)
    assert wants_liger(Settings(), Execution(liger=True), gpu)
    assert not wants_liger(Settings(), Execution(liger=False), gpu)
    assert not wants_liger(Settings(v2=True), Execution(), gpu)
    assert not wants_liger(Settings(), Execution(), cpu)
    with pytest.raises(UserError, match="--liger: its kernels are for GPUs, the device is cpu"):
        wants_liger(Settings(), Execution(liger=True), cpu)
    with pytest.raises(UserError, match="--liger: --v2 tunes the norms"):
        wants_liger(Settings(v2=True), Execution(liger=True), gpu)


def test_liger_leaves_the_loss_alone(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = liger(monkeypatch)
    network = load_model(str(tiny_model), torch.float32)
    assert fuse_parts(network)
    [asked] = calls
    assert asked.pop("model") is network
    assert {name for name, wanted in asked.items() if wanted} == {"rope", "rms_norm", "swiglu", "geglu"}
    assert not asked["fused_linear_cross_entropy"]
    assert not fuse_parts(SimpleNamespace(config=SimpleNamespace(model_type="unknown")))


@pytest.mark.gpu
def test_liger_computes_the_same_losses(tiny_model: Path) -> None:
    pytest.importorskip("liger_kernel", reason="liger-kernel is an extra, [gpu]")
    batch = {
        name: value.cuda() if isinstance(value, torch.Tensor) else value
        for name, value in pack([Example(tuple(range(3, 67)), 20), Example(tuple(range(50, 90)), 10)]).items()
    }
    found = []
    for fused in (False, True):
        torch.manual_seed(0)
        network = load_model(str(tiny_model), torch.float32)
        assert not fused or fuse_parts(network)
        adapter = lak.attach_adapter(network, lak.AdapterConfig(num_layers=3))
        with torch.no_grad():
            for layer in adapter.layers.values():
                layer.gate.fill_(0.7)
        loss, _ = response_loss(network.cuda(), batch)
        loss.backward()
        found.append((loss.detach(), [parameter.grad for parameter in adapter.parameters()]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-3)
