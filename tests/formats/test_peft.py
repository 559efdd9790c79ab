"""PEFT: its own code writes folders that are read here, and reads folders that are written here, with the same logits."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import llama_adapter_kernels as lak
from llama_adapter_kernels.formats import peft
from llama_adapter_kernels.formats.registry import read_adapter
from tests.support.eager_llama import LAYERS, TOKENS, small_llama
from tests.support.wild_adapters import imported

library = pytest.importorskip("peft")


def real(model: nn.Module, layers: int = 3) -> Any:
    """PEFT's own model around this one, its prompts and gates random."""
    config = library.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=5, adapter_layers=layers)
    torch.manual_seed(6)
    wrapped = library.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "adaption_gate" in name:
                parameter.copy_(torch.randn(1) + 0.5)
            if "adaption_prompt" in name:
                parameter.copy_(torch.randn(parameter.shape).float())  # this package keeps adapters in float32
    return wrapped.eval()


def with_output_bias(model: nn.Module) -> nn.Module:
    """The same model with a bias behind its output projections, which PEFT adds twice."""
    for layer in model.model.layers:
        out = layer.self_attn.o_proj
        out.bias = nn.Parameter(torch.linspace(-0.5, 0.5, out.out_features).double())
    return model


@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("biased", [False, True])
@torch.no_grad()
def test_real_peft_writes_what_we_read(tmp_path: Path, groups: int, biased: bool) -> None:
    prepare = with_output_bias if biased else lambda model: model
    wrapped = real(prepare(small_llama(groups)))
    expected = wrapped(TOKENS).logits
    wrapped.save_pretrained(tmp_path)
    model = prepare(small_llama(groups))
    base = model(TOKENS).logits
    assert (expected - base).abs().max() > 0.1
    for path in (tmp_path, tmp_path / "adapter_model.safetensors"):
        with imported(model, path) as adapter:
            assert (model(TOKENS).logits - expected).abs().max() < 1e-5 * expected.abs().max()
        assert (adapter.config.gate, adapter.config.gate_shape) == ("identity", "scalar")
        assert torch.equal(model(TOKENS).logits, base)


@torch.no_grad()
def test_real_peft_reads_what_we_write(tmp_path: Path) -> None:
    model = small_llama()
    config = lak.AdapterConfig(prefix_length=6, num_layers=2, gate="tanh", gate_shape="scalar")
    adapter = lak.attach_adapter(model, config)
    for parameter in adapter.parameters():
        parameter.copy_(torch.randn_like(parameter))
    expected = model(TOKENS).logits
    adapter.save_pretrained(tmp_path / "native")
    notes = peft.write(tmp_path / "theirs", read_adapter(tmp_path / "native").state)
    assert notes == ("gates: tanh of them was written, the format's are raw",)
    wrapped = library.PeftModel.from_pretrained(small_llama(), tmp_path / "theirs").eval()
    assert (wrapped(TOKENS).logits - expected).abs().max() < 1e-5 * expected.abs().max()
    lak.detach_adapter(model)
    with imported(model, tmp_path / "theirs"):
        assert torch.equal(model(TOKENS).logits, expected)


def test_round_trips_to_the_bit(tmp_path: Path) -> None:
    real(small_llama().float()).save_pretrained(tmp_path / "theirs")
    reading = read_adapter(tmp_path / "theirs")
    peft.write(tmp_path / "ours", reading.state)
    theirs, ours = (load_file(tmp_path / name / peft.WEIGHTS_FILE) for name in ("theirs", "ours"))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in theirs)
    config = library.AdaptionPromptConfig.from_pretrained(tmp_path / "ours")
    assert (config.adapter_len, config.adapter_layers, config.target_modules) == (5, 3, "self_attn")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lak.AdapterConfig(prefix_length=4), "PEFT has one gate per layer, this adapter has one per head"),
        (lak.AdapterConfig(prefix_length=4, gate_shape="scalar", layers=(0, 2)), r"in the last layers only, got"),
        (lak.AdapterConfig(prefix_length=4, gate_shape="scalar", tuning=lak.Tuning()), "tunes the model besides"),
        (lak.AdapterConfig(prefix_length=4, gate_shape="scalar", prefix_rows="legacy"), "prefix_rows: PEFT takes"),
    ],
)  # fmt: skip
def test_what_peft_has_no_place_for_is_refused_with_the_reason(
    tmp_path: Path, config: lak.AdapterConfig, message: str
) -> None:
    lak.attach_adapter(small_llama(), config).save_pretrained(tmp_path / "native")
    with pytest.raises(ValueError, match=message):
        peft.write(tmp_path / "theirs", read_adapter(tmp_path / "native").state)
    assert not (tmp_path / "theirs").exists()


def change(**changes: Any) -> Any:
    def apply(folder: Path) -> None:
        path = folder / peft.CONFIG_FILE
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return apply


def change_tensor(name: str, value: torch.Tensor | None) -> Any:
    def apply(folder: Path) -> None:
        path = folder / peft.WEIGHTS_FILE
        tensors = load_file(path)
        key = f"base_model.model.model.layers.{name}"
        tensors.pop(key) if value is None else tensors.update({key: value})
        save_file(tensors, path)

    return apply


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change(adapter_len=6), "adapter_len: 5 in the weights, 6 in adapter_config.json"),
        (change(adapter_layers="3"), "adapter_layers: 3 in the weights, '3' in adapter_config.json"),
        (change(peft_type="LORA"), "peft_type: expected ADAPTION_PROMPT, got 'LORA'"),
        (change_tensor("2.self_attn.adaption_gate", None), r"missing keys: layers\.2\.self_attn\.adaption_gate"),
        (change_tensor("3.self_attn.adaption_gate", torch.ones(4)), r"adaption_gate: expected shape \[1\] .*, got \[4\]"),
        (change_tensor("3.self_attn.adaption_prompt", torch.ones(1, 5, 16)), r"expected shape .*, got \[1, 5, 16\]"),
        (lambda folder: (folder / peft.WEIGHTS_FILE).write_text("version https://git-lfs"), "expected a safetensors file"),
    ],
)  # fmt: skip
def test_folders_that_do_not_fit(tmp_path: Path, damage: Any, message: str) -> None:
    real(small_llama().float()).save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        read_adapter(tmp_path)


def test_paths_in_a_configuration_are_not_followed(tmp_path: Path) -> None:
    real(small_llama().float()).save_pretrained(tmp_path / "folder")
    (tmp_path / "secret").mkdir()
    change(base_model_name_or_path="../secret/../../../../etc/passwd", auto_mapping={"a": "../x"})(tmp_path / "folder")
    reading = read_adapter(tmp_path / "folder")
    assert "secret" not in json.dumps(reading.state.base) + " ".join(reading.notes)
    assert reading.state.config.layer_numbers(LAYERS) == (1, 2, 3)
