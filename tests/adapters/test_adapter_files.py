"""Saved adapters: whole or absent, nothing unpickled, errors that name both sides."""

import errno
import json
import os
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import llama_adapter_kernels as lak
from tests.support.small_models import TOKENS, adapted, build


def test_files_hold_what_they_should(tmp_path: Path) -> None:
    _, adapter = adapted(num_layers=2)
    adapter.save_pretrained(tmp_path / "new" / "folder")
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == [
        "adapter.safetensors",
        "zero_gate_adapter.json",
    ]
    facts = json.loads((tmp_path / "new" / "folder" / "zero_gate_adapter.json").read_text())
    assert facts["format_version"] == 1
    assert facts["base_model"] == {
        "model_type": "llama", "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 12,
    }  # fmt: skip
    state = load_file(tmp_path / "new" / "folder" / "adapter.safetensors")
    assert {name: (list(t.shape), t.dtype) for name, t in state.items()} == {
        f"layers.{i}.{name}": (shape, torch.float32)
        for i in (1, 2)
        for name, shape in (("prompt", [4, 48]), ("gate", [4]))
    }


def test_files_are_readable_by_others_as_umask_says(tmp_path: Path) -> None:
    _, adapter = adapted()
    before = os.umask(0o022)
    try:
        adapter.save_pretrained(tmp_path)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o644}


@pytest.mark.parametrize("moment", ["write", "fsync", "replace"])
def test_a_failing_disk_leaves_the_old_files_whole(
    tmp_path: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, adapter = adapted()
    adapter.save_pretrained(tmp_path)
    old = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    expected = model(TOKENS).logits
    with torch.no_grad():
        adapter.layers["0"].prompt.zero_()

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        if moment == "write":  # the file system itself refuses after 1000 bytes
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
        else:
            monkeypatch.setattr(os, moment, fail)
        with pytest.raises(OSError, match=r"No space left|File too large"):
            adapter.save_pretrained(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == old
    other = build()
    lak.load_adapter(other, tmp_path)
    assert torch.equal(other(TOKENS).logits, expected)


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("exploded",)


def test_loading_never_unpickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _, adapter = adapted()
    adapter.save_pretrained(tmp_path)
    torch.save({"layers.0.prompt": Bomb()}, tmp_path / "adapter.safetensors")
    with pytest.raises(ValueError, match=r"adapter\.safetensors: expected a safetensors file"):
        lak.load_adapter(build(), tmp_path)
    (tmp_path / "adapter.safetensors").unlink()
    torch.save({"layers.0.prompt": Bomb()}, tmp_path / "adapter.bin")
    with pytest.raises(FileNotFoundError, match=r"adapter\.safetensors: no such file"):
        lak.load_adapter(build(), tmp_path)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "expected a JSON object"),
        ("[]", "expected a JSON object, got list"),
        ('{"format_version": 2}', "expected format_version 1, got 2"),
        (
            '{"format_version": 1, "adapter": {"gate": "relu"}, "base_model": {}}',
            "expected tanh or identity, got 'relu'",
        ),
        ('{"format_version": 1, "adapter": {"rank": 8}, "base_model": {}}', "rank"),
        ('{"peft_type": "ADAPTION_PROMPT"}', "format_version"),
        (b"\xff\xfe", "expected a JSON object"),
    ],
)
def test_configurations_that_are_none(tmp_path: Path, content: str | bytes, message: str) -> None:
    file = tmp_path / "zero_gate_adapter.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    model = build()
    with pytest.raises(ValueError, match=message) as raised:
        lak.load_adapter(model, tmp_path)
    assert str(file) in str(raised.value)
    assert not any("zero_gate" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("layers.1.gate"), r"missing tensors: layers\.1\.gate; unknown tensors: none"),
        (lambda state: state.update(extra=torch.zeros(1)), "missing tensors: none; unknown tensors: extra"),
        (
            lambda state: state.update({"layers.0.gate": torch.zeros(5)}),
            r"layers\.0\.gate: expected shape \[4\], got \[5\]",
        ),
    ],
)
def test_weights_that_do_not_fit(tmp_path: Path, change: object, message: str) -> None:
    _, adapter = adapted()
    adapter.save_pretrained(tmp_path)
    state = load_file(tmp_path / "adapter.safetensors")
    change(state)
    save_file(state, tmp_path / "adapter.safetensors")
    with pytest.raises(ValueError, match=message):
        lak.load_adapter(build(), tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("qwen3", "made for a model with model_type llama, head_dim 12; this model has model_type qwen3, head_dim 16"),
        ("llama multi-head with biases", "with num_key_value_heads 2; this model has num_key_value_heads 4"),
    ],
)
def test_a_wrong_base_model_is_named_with_the_right_one(tmp_path: Path, name: str, message: str) -> None:
    _, adapter = adapted()
    adapter.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        lak.load_adapter(build(name), tmp_path)


def test_numbers_that_are_none_are_not_saved(tmp_path: Path) -> None:
    _, adapter = adapted()
    with torch.no_grad():
        adapter.layers["1"].gate[0] = float("nan")
    with pytest.raises(ValueError, match=r"layers\.1\.gate: expected finite"):
        adapter.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_half_precision_files_load(tmp_path: Path) -> None:
    _, adapter = adapted()
    adapter.save_pretrained(tmp_path)
    state = load_file(tmp_path / "adapter.safetensors")
    save_file({name: tensor.bfloat16() for name, tensor in state.items()}, tmp_path / "adapter.safetensors")
    loaded = lak.load_adapter(build(), tmp_path)
    assert torch.equal(loaded.layers["1"].prompt, state["layers.1.prompt"].bfloat16().float())


def test_a_broken_file_leaves_the_model_alone(tmp_path: Path) -> None:
    _, adapter = adapted()
    adapter.save_pretrained(tmp_path)
    state = load_file(tmp_path / "adapter.safetensors")
    state["layers.1.prompt"][3, 7] = float("inf")
    save_file(state, tmp_path / "adapter.safetensors")
    model = build()
    with pytest.raises(ValueError, match=r"layers\.1\.prompt: expected finite"):
        lak.load_adapter(model, tmp_path)
    assert not any("zero_gate" in name for name, _ in model.named_modules())
    assert all(p.requires_grad for p in model.parameters())


def test_files_are_not_taken_for_those_of_peft(tmp_path: Path) -> None:
    """transformers looks for adapter_config.json in any folder and would hand this one to PEFT."""
    from transformers.utils import find_adapter_config_file

    _, adapter = adapted()
    adapter.save_pretrained(tmp_path)
    assert find_adapter_config_file(str(tmp_path)) is None
    with pytest.raises((OSError, ValueError), match=r"model_type|config\.json"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
