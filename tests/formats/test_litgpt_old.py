"""Files of LitGPT before 0.5.5 and of lit-llama: logits equal an eager model written from their conventions."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import llama_adapter_kernels as lak
from llama_adapter_kernels.formats import litgpt_writing
from llama_adapter_kernels.formats.reading import Choices
from llama_adapter_kernels.formats.registry import read_adapter
from tests.support.eager_llama import (
    FFN,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    LAYERS,
    TOKENS,
    VOCABULARY,
    Eager,
    pairs,
    small_llama,
    weights_of_meta,
)
from tests.support.wild_adapters import PROMPTS, imported

META = {
    "self_attn.o_proj": "attention.wo",
    "gate": "feed_forward.w1",
    "up": "feed_forward.w3",
    "down": "feed_forward.w2",
}
SIZES = {"attention.wo": HIDDEN, "feed_forward.w1": FFN, "feed_forward.w3": FFN, "feed_forward.w2": HIDDEN}


def prompts_of(content: dict[str, Tensor], layer: int) -> tuple[Tensor, Tensor] | None:
    name = f"transformer.h.{layer}.attn"
    if f"{name}.adapter_wte.weight" not in content:
        return None
    gate = content[f"{name}.gating_factor"].reshape(-1)
    return content[f"{name}.adapter_wte.weight"], gate.expand(HEADS)


def version_1(shape: tuple[int, ...], start: int = 2) -> dict[str, Tensor]:
    torch.manual_seed(8)
    content = {}
    for layer in range(start, LAYERS):
        content[f"transformer.h.{layer}.attn.adapter_wte.weight"] = torch.randn(PROMPTS, HIDDEN)
        content[f"transformer.h.{layer}.attn.gating_factor"] = torch.randn(shape)
    return content


@torch.no_grad()
def same(model: nn.Module, path: Path, expected: Tensor) -> None:
    base = model(TOKENS).logits
    assert (expected - base).abs().max() > 0.05
    with imported(model, path) as adapter:
        assert (model(TOKENS).logits - expected).abs().max() < 1e-5 * expected.abs().max()
    assert adapter.config.prefix_rows == "own"


@pytest.mark.parametrize("shape", [(1, 1, HEADS, 1), (1, HEADS, 1, 1), (1,)], ids=str)
@pytest.mark.parametrize("groups", [HEADS, 2])
def test_version_1(tmp_path: Path, shape: tuple[int, ...], groups: int) -> None:
    content = version_1(shape)
    torch.save({"model": content} if shape != (1,) else content, tmp_path / "file.pth")
    model = small_llama(groups)
    expected = Eager(weights_of_meta(model), lambda layer: prompts_of(content, layer)).logits()
    same(model, tmp_path / "file.pth", expected)


def version_2(kind: str, groups: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(the file's content, the same scales, biases and norms by Meta's names and in Meta's order)."""
    content, meta = version_1((1, 1, HEADS, 1)), {}
    lit = kind == "lit-llama"
    names = {
        "attn.c_proj" if lit else "attn.proj": "attention.wo", "mlp.c_fc1" if lit else "mlp.fc_1": "feed_forward.w1",
        "mlp.c_fc2" if lit else "mlp.fc_2": "feed_forward.w3", "mlp.c_proj" if lit else "mlp.proj": "feed_forward.w2",
    }  # fmt: skip
    weight = "scale" if lit else "weight"
    for layer in range(LAYERS):
        for what, around in (("bias", 0.0), ("scale", 1.0)):
            for name, linear in names.items():
                value = around + 0.3 * torch.randn(SIZES[linear])
                content[f"transformer.h.{layer}.{name}.adapter_{what}"] = meta[f"layers.{layer}.{linear}_{what}"] = (
                    value
                )
            query, key, value = (around + 0.3 * torch.randn(heads * HEAD_DIM) for heads in (HEADS, groups, groups))
            if lit:  # all of queries, of keys, of values, each in Meta's order
                content[f"transformer.h.{layer}.attn.c_attn.adapter_{what}"] = torch.cat([query, key, value])
            else:  # per group its queries, its key, its value, in the order of transformers
                grouped = torch.cat([part.view(groups, -1) for part in (query, key, value)], 1)
                content[f"transformer.h.{layer}.attn.attn.adapter_{what}"] = grouped.flatten()
                query, key = pairs(query), pairs(key)
            for part, found in zip("qkv", (query, key, value), strict=True):
                meta[f"layers.{layer}.attention.w{part}_{what}"] = found
        for name, norm in (("1", "attention_norm"), ("2", "ffn_norm")):
            value = 1 + 0.3 * torch.randn(HIDDEN)
            content[f"transformer.h.{layer}.{'rms' if lit else 'norm'}_{name}.{weight}"] = value
            meta[f"layers.{layer}.{norm}"] = value
    content[f"transformer.ln_f.{weight}"] = meta["norm"] = 1 + 0.3 * torch.randn(HIDDEN)
    content["lm_head.adapter_bias"] = meta["output_bias"] = 0.3 * torch.randn(VOCABULARY)
    content["lm_head.adapter_scale"] = meta["output_scale"] = 1 + 0.3 * torch.randn(VOCABULARY)
    return content, {name: value.double() for name, value in meta.items()}


@pytest.mark.parametrize(("kind", "groups"), [("lit-llama", HEADS), ("LitGPT", HEADS), ("LitGPT", 2), ("LitGPT", 1)])
def test_version_2(tmp_path: Path, kind: str, groups: int) -> None:
    content, meta = version_2(kind, groups)
    torch.save(content if kind == "lit-llama" else {"model": content}, tmp_path / "file.pth")
    model = small_llama(groups)
    weights = weights_of_meta(model)

    def changed(name: str, x: Tensor) -> Tensor:
        return meta[f"{name}_scale"] * (x @ weights[name].T + meta[f"{name}_bias"])

    eager = Eager(weights, lambda layer: prompts_of(content, layer), changed, lambda name: meta[name], changed)
    same(model, tmp_path / "file.pth", eager.logits())


@pytest.mark.parametrize("groups", [HEADS, 2, 1])
def test_version_2_round_trips_to_the_bit(tmp_path: Path, groups: int) -> None:
    content, _ = version_2("LitGPT", groups)
    torch.save({"model": content}, tmp_path / "theirs")
    state = read_adapter(tmp_path / "theirs").state
    state.base["num_key_value_heads"] = groups
    notes = litgpt_writing.write(tmp_path / "ours", state)
    ours = torch.load(tmp_path / "ours", weights_only=True)["model"]
    assert ours.keys() == content.keys()
    assert all(torch.equal(ours[name], content[name]) for name in content)
    assert "for LitGPT up to 0.5.4: later ones take other rows for the prefix" in notes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"transformer.h.3.attn.gating_factor": None}, r"missing keys: transformer\.h\.3\.attn\.gating_factor"),
        ({"transformer.h.1.mlp.fc_1.adapter_bias": None}, r"missing keys: mlp\.fc_1\.adapter_bias of layer 1"),
        ({"transformer.ln_f.weight": None}, r"missing keys: transformer\.ln_f\.weight"),
        ({"transformer.h.0.attn.qkv.adapter_bias": torch.ones(96)}, "one layout of queries, keys and values, got"),
        ({"transformer.h.0.mlp.fc.adapter_bias": torch.ones(96)}, "keys of a model that is no Llama"),
        ({"transformer.h.2.attn.gating_factor": torch.ones(1, 3, 1, 1)}, "expected shape|expected one gate per head"),
        ({"transformer.h.0.attn.attn.adapter_bias": torch.ones(95)}, "no whole heads of 8 for 4 queries|expected shape"),
    ],
)  # fmt: skip
def test_files_that_do_not_fit(tmp_path: Path, change: dict[str, Tensor | None], message: str) -> None:
    content, _ = version_2("LitGPT", HEADS)
    merged = {name: value for name, value in (content | change).items() if value is not None}
    torch.save({"model": merged}, tmp_path / "file.pth")
    with pytest.raises(ValueError, match=message):
        read_adapter(tmp_path / "file.pth", choices=Choices())


def test_models_that_norm_their_keys_are_refused(tmp_path: Path) -> None:
    torch.save({"model": version_1((1, 1, HEADS, 1))}, tmp_path / "file.pth")
    model = small_llama()
    for layer in model.model.layers:
        layer.self_attn.k_norm = nn.RMSNorm(HEAD_DIM)
    with pytest.raises(ValueError, match="LitGPT does not norm the keys of prompts"):
        lak.load_adapter(model, tmp_path / "file.pth")
    assert not lak.attached_adapters(model)
