"""`llama-adapter convert`: from one project to another, and base models."""

from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

import llama_adapter_kernels as lak
from llama_adapter_kernels.cli import app
from llama_adapter_kernels.formats.registry import read_adapter
from tests.formats.test_meta_weights import LLAMA_1, write_shards
from tests.support import wild_adapters as wild
from tests.support.eager_llama import TOKENS, small_llama


def convert(*arguments: Any) -> Result:
    return CliRunner().invoke(app, ["convert", *map(str, arguments)])


@pytest.mark.parametrize("gate", ["tanh", "identity"])
def test_from_project_to_project_the_logits_stay(tmp_path: Path, gate: str) -> None:
    torch.save(wild.v1_file(), tmp_path / "v1.pth")
    model = small_llama()
    model.save_pretrained(tmp_path / "base")
    steps = [
        ("v1.pth", "native", ["--gate", gate]),
        ("native", "litgpt", ["--to", "litgpt"]),
        ("litgpt", "native again", ["--to", "native", "--from", "litgpt", "--base", tmp_path / "base"]),
        ("native again", "v1 again", ["--to", "official-v1"]),
    ]
    expected = None
    with torch.no_grad():
        for source, target, options in steps:
            result = convert(tmp_path / source, tmp_path / target, *options)
            assert result.exit_code == 0, result.output
            assert f"Written to {tmp_path / target}" in result.output.replace("\n", "")
            choices = {"gate": "identity"} if target == "v1 again" else {}
            with wild.imported(model, tmp_path / target, **choices):
                found = model(TOKENS).logits
            assert expected is None or torch.equal(found, expected)
            expected = found
    assert f"gate activation: {gate} (as chosen)" in convert(tmp_path / "v1.pth", tmp_path / "x", "--gate", gate).output
    # tanh of the gates was written where a format has raw ones, so only raw ones come back as they were.
    if gate == "identity":
        theirs, ours = (torch.load(tmp_path / name, weights_only=True) for name in ("v1.pth", "v1 again"))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_parts_without_a_place_are_kept_or_named(tmp_path: Path) -> None:
    torch.save({"model": wild.multimodal_file()}, tmp_path / "file.pth")
    result = convert(tmp_path / "file.pth", tmp_path / "native")
    assert result.exit_code == 0, result.output
    assert "kept beside the adapter for load_conditioning, which needs their encoder: " in result.output
    result = convert(tmp_path / "native", tmp_path / "litgpt", "--to", "litgpt")
    assert result.exit_code == 2
    assert "error: tuning.prompts: LitGPT makes keys and values of prompts by the tuned projections" in result.output
    assert not (tmp_path / "litgpt").exists()


def test_base_models_of_meta(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = small_llama()
    write_shards(tmp_path / "meta", model, 2, LLAMA_1)
    result = convert(tmp_path / "meta", tmp_path / "folder", "--max-positions", "96")
    assert result.exit_code == 0, result.output
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "folder", dtype="auto")
    assert torch.equal(written(TOKENS).logits, model(TOKENS).logits)
    assert written.config.max_position_embeddings == 96


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing", "new"], "nothing: no such file or folder"),
        (["v1.pth", "v1.pth"], "v1.pth: expected a new file or folder, there is something already"),
        (["v1.pth", "new", "--from", "pickle"], "--from: expected one of auto, native"),
        (["v1.pth", "new", "--to", "pickle"], "--to: expected one of native, official-v1, peft, litgpt; got 'pickle'"),
        (["v1.pth", "new", "--gate", "sigmoid"], "gate: expected tanh or identity, got 'sigmoid'"),
        (["v1.pth", "new", "--prefix-length", "3"], "10 rows of prompts: expected 3 for each of at most 4 layers"),
        (["v1.pth", "new", "--to", "peft"], "PEFT has one gate per layer, this adapter has one per head"),
        (["v1.pth", "new", "--from", "litgpt"], "expected keys of litgpt, got official-v1"),
        (["v1.pth", "new", "--from", "gguf"], "expected a GGUF file"),
        (["v1.pth", "new", "--dtype", "int8"], "--dtype: expected one of bfloat16"),
        (["v1.pth", "new", "--base", "wider"], "with hidden_size 32, head_dim 8; the base model has hidden_size 64"),
        (["v1.pth", "new", "--base", "nothing"], "config.json"),
        (["meta", "new", "--to", "peft"], "a base model is written as huggingface, got 'peft'"),
    ],
)  # fmt: skip
def test_mistakes_are_one_sentence_and_leave_nothing(
    tmp_path: Path, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "500")
    torch.save(wild.v1_file(), "v1.pth")
    write_shards(Path("meta"), small_llama(), 1, LLAMA_1)
    Path("wider").mkdir()
    Path("wider/config.json").write_text('{"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}')
    before = sorted(path.name for path in tmp_path.iterdir())
    result = convert(*arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_an_interruption_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(wild.v1_file(), tmp_path / "v1.pth")

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    for target, module in (("native", "safetensors.torch.save"), ("litgpt", "torch.save")):
        with monkeypatch.context() as patch:
            patch.setattr(module, interrupt)
            result = convert(tmp_path / "v1.pth", tmp_path / "new", "--to", target)
        assert result.exit_code == 130
        assert [path.name for path in tmp_path.iterdir()] == ["v1.pth"]


def test_a_loaded_foreign_adapter_is_saved_as_native(tmp_path: Path) -> None:
    torch.save(wild.v1_file(), tmp_path / "v1.pth")
    adapter = lak.load_adapter(small_llama(), tmp_path / "v1.pth", gate="identity")
    adapter.save_pretrained(tmp_path / "saved")
    assert read_adapter(tmp_path / "saved").state.config.gate == "identity"
