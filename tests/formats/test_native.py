"""This package's own files when they lie about what they hold."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llama_adapter_kernels.adapters.config import AdapterConfig
from llama_adapter_kernels.adapters.state import AdapterState
from llama_adapter_kernels.adapters.v2 import Tuning
from llama_adapter_kernels.formats import native
from tests.formats.test_torch_file import little_memory

BASE = {
    "model_type": "llama", "hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 2,
}  # fmt: skip


def state(leftover: dict[str, torch.Tensor] | None = None) -> AdapterState:
    tensors = {f"layers.{n}.prompt": torch.randn(5, 8) for n in (1, 2)}
    tensors |= {f"layers.{n}.gate": torch.randn(4) for n in (1, 2)}
    return AdapterState(AdapterConfig(prefix_length=5, num_layers=2), BASE, tensors, leftover or {})


def test_an_adapter_comes_back_with_everything(tmp_path: Path) -> None:
    tensors = {
        "layers.2.prompt": torch.randn(5, 8), "layers.2.gate": torch.randn(4), "layers.2.new_gate": torch.randn(1),
        "tuning.layers.0.self_attn.q_proj.bias": torch.randn(8), "tuning.norm.weight": torch.randn(8),
        "tuning.layers.0.mlp.up_proj.lora_a": torch.randn(3, 8), "tuning.layers.0.mlp.up_proj.lora_b": torch.randn(9, 3),
    }  # fmt: skip
    tuning = Tuning(bias=("q_proj",), scale="none", lora_rank=3)
    config = AdapterConfig(prefix_length=5, layers=(2,), gate="identity", tuning=tuning, prefix_rows="legacy")
    saved = AdapterState(config, BASE, tensors, {"visual_proj.weight": torch.ones(2, 2, dtype=torch.float16)})
    native.write(tmp_path, saved)
    found = native.read(tmp_path)
    assert (found.config, found.base) == (saved.config, saved.base)
    for ours, theirs in ((found.tensors, saved.tensors), (found.leftover, saved.leftover)):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours)
    native.write(tmp_path, state())
    assert native.read(tmp_path).leftover == {}


DEEP = "[" * 100_000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prefix_length": 4.0}, "prefix_length: expected a whole number"),
        ({"prefix_length": True}, "prefix_length: expected a whole number"),
        ({"prefix_length": 10**12}, "prefix_length: expected a whole number"),
        ({"prefix_length": 10**30}, "prefix_length: expected a whole number"),
        ({"prefix_length": 1e30}, "prefix_length: expected a whole number"),
        ({"prefix_length": 6}, r"layers\.1\.prompt: expected shape \[6, 8\], got \[5, 8\]"),
        ({"prefix_length": 1 << 16}, r"layers\.1\.prompt: expected shape \[65536, 8\], got \[5, 8\]"),
        ({"num_layers": "2"}, "num_layers: expected a whole number"),
        ({"num_layers": 2.0}, "num_layers: expected a whole number"),
        ({"num_layers": 4}, r"num_layers: expected 1 to 3 \(the layers of the model\), got 4"),
        ({"num_layers": 1}, r"unknown tensors: layers\.1\.gate, layers\.1\.prompt"),
        ({"num_layers": None, "layers": "ab"}, "layers: expected numbers of layers"),
        ({"num_layers": None, "layers": [1, 1]}, "layers: expected different numbers"),
        ({"num_layers": None, "layers": [1, 2.0]}, "layers: expected numbers of layers"),
        ({"gate_shape": "scalar"}, r"layers\.1\.gate: expected shape \[1\], got \[4\]"),
        ({"gate": ["tanh"]}, r"gate: expected tanh or identity, got \['tanh'\]"),
        ({"gate": "t" * 1_000_000}, "gate: expected tanh or identity"),
        ({"rank": 4}, "rank"),
        ({"tuning": {"bias": True, "norms": 3}}, "norms: expected true or false, got 3"),
        ({"tuning": "v2"}, "tuning: expected"),
        ({"tuning": {"rank": 3}}, "rank"),
    ],
    ids=str,
)  # fmt: skip
def test_configurations_that_lie(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    native.write(tmp_path, state())
    facts = json.loads((tmp_path / native.CONFIG_FILE).read_text())
    facts["adapter"] |= change
    (tmp_path / native.CONFIG_FILE).write_text(json.dumps(facts))
    with little_memory(), pytest.raises(ValueError, match=message) as raised:
        native.read(tmp_path)
    assert str(tmp_path) in str(raised.value)
    assert len(str(raised.value)) < 700


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 16}, r"layers\.1\.prompt: expected shape \[5, 16\], got \[5, 8\]"),
        ({"hidden_size": "8"}, "hidden_size of the base model: expected a whole number"),
        ({"num_hidden_layers": 10**15}, "num_hidden_layers of the base model: expected a whole number"),
        ({"num_attention_heads": 2}, r"layers\.1\.gate: expected shape \[2\], got \[4\]"),
        ({"num_key_value_heads": -1}, "num_key_value_heads of the base model"),
        ({"model_type": {"a": 1}}, "model_type of the base model: expected a name"),
    ],
    ids=str,
)
def test_base_models_that_are_none(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    native.write(tmp_path, state())
    facts = json.loads((tmp_path / native.CONFIG_FILE).read_text())
    facts["base_model"] |= change
    (tmp_path / native.CONFIG_FILE).write_text(json.dumps(facts))
    with pytest.raises(ValueError, match=message):
        native.read(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (DEEP, "expected a JSON object"),
        ('{"format_version": 1, "format_version": 1}', "'format_version' is there twice"),
        ('{"format_version": NaN}', "NaN is not JSON"),
        ('{"format_version": ' + "9" * 10_000 + "}", "expected a JSON object"),
        ('{"format_version": true, "adapter": {}, "base_model": {}}', "expected format_version 1, got True"),
        ('{"format_version": 1, "adapter": [], "base_model": {}}', "expected objects as adapter and base_model"),
        ('{"format_version": 1, "adapter": {}, "base_model": {}, "also": 1}', "got adapter, also, base_model"),
        ('{"a": "' + "x" * 5_000_000 + '"}', "expected at most 4194304 bytes of JSON"),
    ],
    ids=["deep", "twice", "nan", "digits", "true", "list", "more", "long"],
)
def test_files_that_are_no_configuration(tmp_path: Path, content: str, message: str) -> None:
    native.write(tmp_path, state())
    (tmp_path / native.CONFIG_FILE).write_text(content)
    with pytest.raises(ValueError, match=message) as raised:
        native.read(tmp_path)
    assert len(str(raised.value)) < 700


def change_gate(value: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["layers.1.gate"] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_gate(torch.ones(4, dtype=torch.int8)), r"layers\.1\.gate: expected a floating tensor, got torch\.int8"),
        (change_gate(torch.ones(4, dtype=torch.bool)), r"expected a floating tensor, got torch\.bool"),
        (change_gate(torch.ones(4, dtype=torch.complex64)), r"expected a floating tensor, got torch\.complex64"),
        (change_gate(torch.tensor([1.0, float("nan"), 1, 1])), r"layers\.1\.gate: expected finite values"),
        (change_gate(torch.tensor([1.0, float("-inf"), 1, 1])), r"layers\.1\.gate: expected finite values"),
        (lambda tensors: tensors.update({"x" * 50_000: torch.ones(1)}), "unknown tensors: x"),
        (lambda tensors: tensors.update({"tuning.norm.weight": torch.ones(8)}), "the configuration has no tuning"),
        (lambda tensors: tensors.pop("layers.2.prompt"), r"missing tensors: layers\.2\.prompt; unknown tensors: none"),
    ],
)  # fmt: skip
def test_weights_that_are_none(tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], None], message: str) -> None:
    native.write(tmp_path, state())
    tensors = load_file(tmp_path / native.WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, tmp_path / native.WEIGHTS_FILE)
    with pytest.raises(ValueError, match=message) as raised:
        native.read(tmp_path)
    assert len(str(raised.value)) < 700


def test_a_header_that_promises_more_than_the_file_holds(tmp_path: Path) -> None:
    native.write(tmp_path, state())
    file = tmp_path / native.WEIGHTS_FILE
    header = {"layers.1.gate": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}}
    encoded = json.dumps(header).encode()
    file.write_bytes(len(encoded).to_bytes(8, "little") + encoded + bytes(16))
    with little_memory(), pytest.raises(ValueError, match="expected a safetensors file"):
        native.read(tmp_path)
    one = '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    file.write_bytes(len(one).to_bytes(8, "little") + one.encode() + bytes(4))
    with pytest.raises(ValueError, match="'a' is there twice"):
        native.read(tmp_path)
    for content in (b"", b"\xff" * 8, b"\xff" * 100, (10).to_bytes(8, "little") + b"[" * 10):
        file.write_bytes(content)
        with little_memory(), pytest.raises(ValueError, match="expected a safetensors file"):
            native.read(tmp_path)
