"""Model folders as they come: pointers instead of files, half a download, a config.json that belongs to another model."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llama_adapter_kernels.errors import UserError
from llama_adapter_kernels.models import load_model_and_tokenizer, skeleton, weights_fingerprint

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 12345\n"


def config(**change: object) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))

    return apply


def file(name: str, content: str | bytes) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return apply


def truncate(name: str, size: int) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / name).write_bytes((folder / name).read_bytes()[:size])

    return apply


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (file("model.safetensors", POINTER), "model.safetensors is a Git LFS pointer, not the file: run `git lfs pull`"),
        (file("tokenizer.model", POINTER), "tokenizer.model is a Git LFS pointer"),
        (truncate("model.safetensors", 0), "model.safetensors is damaged or incomplete"),
        (truncate("model.safetensors", 5000), "model.safetensors is damaged or incomplete"),
        (config(hidden_size=128), r"do not fit config.json: .*embed_tokens.weight \[2048, 64\] instead of \[2048, 128\]"),
        (config(vocab_size=1000), r"embed_tokens.weight \[2048, 64\] instead of \[1000, 64\]"),
        (config(num_hidden_layers=5), r"files do not have: model.layers.3.* and 15 more"),
        (config(num_attention_heads=0), "ZeroDivisionError"),
        (config(num_attention_heads="four"), "num_attention_heads"),
        (config(model_type="nonsense"), "nonsense"),
        (config(model_type="t5"), "T5Config"),
        (file("config.json", "[]"), "TypeError"),
        (file("config.json", "[" * 100_000), "RecursionError"),
        (file("config.json", '{"a'), "not a valid JSON file"),
        (file("tokenizer_config.json", "[]"), "AttributeError"),
        (file("tokenizer.json", '{"version"'), "delimiter"),
    ],
)  # fmt: skip
def test_a_damaged_folder_costs_one_sentence(
    tiny_model: Path, tmp_path: Path, damage: Callable[[Path], None], said: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    damage(folder)
    with pytest.raises(UserError, match=f"--model {folder}: .*{said}") as error:
        load_model_and_tokenizer(str(folder), torch.float32)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 800


def test_weights_without_a_place_are_named(tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copytree(tiny_model, tmp_path / "model")
    config(num_hidden_layers=2)(tmp_path / "model")
    with caplog.at_level(logging.WARNING, logger="llama_adapter_kernels"):
        model, _ = load_model_and_tokenizer(str(tmp_path / "model"), torch.float32)
    assert len(model.model.layers) == 2
    assert "were left out: model.layers.2.input_layernorm.weight" in caplog.text


def test_a_skeleton_has_the_shapes_and_no_memory(tiny_model: Path) -> None:
    model, _ = load_model_and_tokenizer(str(tiny_model), torch.float32)
    empty = skeleton(str(tiny_model))
    assert {n: p.shape for n, p in empty.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    assert all(parameter.is_meta for parameter in empty.parameters())


def test_the_fingerprint_is_of_every_byte_and_of_no_path(tiny_model: Path, tmp_path: Path) -> None:
    first = weights_fingerprint(str(tiny_model))
    folder = tmp_path / "elsewhere"
    shutil.copytree(tiny_model, folder)
    assert weights_fingerprint(str(folder)) == first
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-3] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    second = weights_fingerprint(str(folder))
    config(rms_norm_eps=1e-5)(folder)
    assert len({first, second, weights_fingerprint(str(folder))}) == 3
