"""Adapters of the official projects: logits equal an eager model written from their conventions, with open gates."""

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import llama_adapter_kernels as lak
from llama_adapter_kernels.formats import official
from llama_adapter_kernels.formats.registry import read_adapter
from tests.support import wild_adapters as wild
from tests.support.eager_llama import HEADS, HIDDEN, LAYERS, TOKENS, Eager, small_llama, weights_of_meta
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


class TunedEager(Eager):
    """The eager model with a file's changes of its linears and norms, by Meta's names without a `llama.`."""

    def __init__(self, model: nn.Module, content: dict[str, Tensor], prefix: Any, prompts_tuned: bool) -> None:
        self.content = {name: value.double() for name, value in content.items()}
        weights = weights_of_meta(model)
        super().__init__(
            weights, prefix, self.changed, lambda name: self.content.get(f"{name}.weight", weights[name]),
            self.changed if prompts_tuned else None,
        )  # fmt: skip

    def changed(self, name: str, x: Tensor) -> Tensor:
        at, _, linear = name.rpartition(".")
        out = self.plain(name, x * self.content.get(f"{name}_scale", 1.0))
        for low, high in ((f"{at}.lora_{linear}_l1", f"{at}.lora_{linear}_l2"), (f"{name}.lora_a", f"{name}.lora_b")):
            if f"{low}.weight" in self.content:
                out = out + x @ self.content[f"{low}.weight"].T @ self.content[f"{high}.weight"].T
        return out + self.content.get(f"{name}_bias", self.content.get(f"{name}.bias", torch.zeros(())))


def plain_names(content: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("llama.").removeprefix("llma."): value for name, value in content.items()}


@pytest.mark.parametrize("shards", [1, 2])
def test_v2_chat(tmp_path: Path, model: nn.Module, shards: int) -> None:
    content = wild.chat_file()
    split = ("wq_bias", "wk_bias", "wv_bias", "w1_bias", "w3_bias", "wo_scale", "w2_scale")
    for number in range(shards):
        part = {n: v.chunk(shards)[number].clone() if n.endswith(split) else v for n, v in content.items()}
        torch.save(part, tmp_path / f"adapter.{number}.pth")
    expected = TunedEager(model, content, lambda layer: None, True).logits()
    adapter = same(model, tmp_path, expected)
    assert adapter.config.prefix_length == 0
    assert adapter.config.tuning == lak.Tuning(lora_rank=0, new_gate=False, prompts="tuned")


@pytest.mark.parametrize("lora", [0, 3], ids=["bias", "lora"])
@pytest.mark.parametrize("prefix", ["llama.", "llma."])
def test_v2_multimodal(tmp_path: Path, model: nn.Module, lora: int, prefix: str) -> None:
    content = wild.multimodal_file(lora, prefix)
    torch.save(
        {"model": content, "config": {"w_bias": True, "w_lora": bool(lora), "lora_rank": 16}}, tmp_path / "7B.pth"
    )
    plain = plain_names(content)

    def prompts(layer: int) -> tuple[Tensor, Tensor] | None:
        if layer == 0:
            return None
        gate = plain[f"layers.{layer}.attention.gate"].tanh()
        if lora:
            gate = gate * plain[f"layers.{layer}.attention.new_gate"]
        return plain["adapter_query.weight"].view(LAYERS - 1, -1, HIDDEN)[layer - 1], gate

    expected = TunedEager(model, plain, prompts, False).logits()
    with pytest.warns(UserWarning, match="kept beside the adapter, without effect: clip_proj, .*visual_query"):
        adapter = same(model, tmp_path / "7B.pth", expected)
    assert adapter.config.tuning.prompts == "base"
    assert adapter.config.tuning.lora_rank == lora and adapter.config.tuning.new_gate == bool(lora)
    assert adapter.leftover.keys() == {name for name in content if name.startswith(("visual", "clip"))}


@pytest.mark.parametrize(("kind", "layers"), [("imagebind-llm", LAYERS), ("mu-llama", 3)])
def test_one_prompt_per_layer(tmp_path: Path, model: nn.Module, kind: str, layers: int) -> None:
    content = wild.one_prompt_file(kind, layers)
    torch.save({"model": content}, tmp_path / "file.pth")
    plain = plain_names(content)

    def prompts(layer: int) -> tuple[Tensor, Tensor] | None:
        place = layer - (LAYERS - layers)
        gate = plain[f"layers.{layer}.attention.gate"].tanh()
        return None if place < 0 else (plain["prefix_query.weight"][place][None], gate)

    expected = TunedEager(model, plain, prompts, False).logits()
    with pytest.warns(UserWarning, match="kept beside the adapter"):
        same(model, tmp_path / "file.pth", expected, format=kind)


@pytest.mark.parametrize("prefix", ["", "llma."])
@pytest.mark.parametrize("new_gate", [False, True])
@pytest.mark.parametrize(("layers", "tuned"), [(LAYERS, True), (2, True), (LAYERS, False), (2, False)])
def test_accessory(tmp_path: Path, model: nn.Module, layers: int, tuned: bool, new_gate: bool, prefix: str) -> None:
    content = wild.accessory_file(layers, new_gate, tuned, prefix)
    torch.save({"model": content} if prefix else content, tmp_path / "file.pth")
    plain = plain_names(content)

    def prompts(layer: int) -> tuple[Tensor, Tensor] | None:
        place = layer - (LAYERS - layers)
        if place < 0:
            return None
        gate = plain["prefix_gate"][place].tanh() * (plain["prefix_new_gate"][place] if new_gate else 1.0)
        return plain["prefix"][place, 0], gate

    same(model, tmp_path / "file.pth", TunedEager(model, plain, prompts, True).logits())


def test_a_whole_checkpoint_of_v1_with_its_settings(tmp_path: Path, model: nn.Module) -> None:
    content = wild.v1_file()
    whole = content | {f"{name}.weight": weight.float() for name, weight in weights_of_meta(model).items()}
    args = argparse.Namespace(adapter_len=wild.PROMPTS, adapter_layer=2, output_dir="./checkpoint")
    torch.save({"model": whole, "optimizer": {"state": {}}, "epoch": 4, "args": args}, tmp_path / "checkpoint-4.pth")
    torch.save(content, tmp_path / "adapter.pth")
    readings = [read_adapter(tmp_path / name) for name in ("checkpoint-4.pth", "adapter.pth")]
    first, second = (reading.state for reading in readings)
    assert first.config == second.config and not first.leftover
    assert all(torch.equal(first.tensors[name], second.tensors[name]) for name in second.tensors)
    assert any("left out: 39 tensors of the frozen models themselves" in note for note in readings[0].notes)


def test_very_early_files_have_one_gate_per_layer(tmp_path: Path, model: nn.Module) -> None:
    content = {name: value[:, 0].reshape(1) if "gate" in name else value for name, value in wild.v1_file().items()}
    torch.save(content, tmp_path / "adapter.pth")

    def prompts(layer: int) -> tuple[Tensor, Tensor] | None:
        gate = content[f"layers.{layer}.attention.gate"].tanh().expand(HEADS)
        return None if layer < 2 else (content["adapter_query.weight"].view(2, -1, HIDDEN)[layer - 2], gate)

    adapter = same(model, tmp_path / "adapter.pth", Eager(weights_of_meta(model), prompts).logits())
    assert adapter.config.gate_shape == "scalar"


def change(**changes: Any) -> dict[str, Tensor]:
    """A V1 file with some tensors other or (None) missing; __ stands for a dot."""
    content: dict[str, Any] = dict(wild.v1_file())
    for name, value in changes.items():
        content[name.replace("__", ".")] = value
    return {name: value for name, value in content.items() if value is not None}


@pytest.mark.parametrize(
    ("content", "choices", "message"),
    [
        (change(layers__1__attention__gate=None), {}, r"missing keys: layers\.1\.attention\.gate"),
        (change(layers__4__attention__gate=torch.ones(1, HEADS, 1, 1)), {}, "10 rows of prompts for 5 layers"),
        (change(layers__3__attention__gate=torch.ones(1, 2, 1, 1)), {}, "gates: expected one per head or one per layer"),
        (change(adapter_query__weight=torch.ones(11, HIDDEN)), {}, "11 rows of prompts for 4 layers, the last 2"),
        (change(adapter_query__weight=torch.ones(10, 64)), {}, "with hidden_size 64, head_dim 16; this model has"),
        (change(adapter_query__weight=torch.ones(10)), {}, r"adapter_query\.weight: expected \[layers times"),
        (change(adapter_query__weight=torch.full((10, HIDDEN), float("nan"))), {}, "expected finite values, got NaN"),
        (change(adapter_query__weight=torch.ones(10, HIDDEN).int()), {}, r"expected a floating tensor, got torch\.int32"),
        (change(llama__adapter_query__weight=torch.ones(10, HIDDEN)), {}, "expected one of them, got both"),
        (change(), {"prefix_length": 3}, "10 rows of prompts: expected 3 for each of at most 4 layers"),
        (change(), {"prefix_length": 0}, "prefix_length: expected a whole number from 1"),
        (change(), {"gate": "sigmoid"}, "gate: expected tanh or identity"),
        (change(), {"format": "peft"}, "expected keys of peft, got official-v1"),
        (change(), {"format": "pickle"}, "format: expected auto, native, official-v1"),
        ({"weight": torch.ones(2, 2)}, {}, r"keys of none of them: weight"),
        (wild.multimodal_file() | {"adapter_query.weight": torch.ones(14, HIDDEN)}, {}, "14 rows of prompts: expected 5"),
    ],
)  # fmt: skip
def test_files_that_do_not_fit(
    tmp_path: Path, model: nn.Module, content: Any, choices: dict[str, Any], message: str
) -> None:
    torch.save(content, tmp_path / "file.pth")
    with pytest.raises(ValueError, match=message):
        lak.load_adapter(model, tmp_path / "file.pth", **choices)
    assert not lak.attached_adapters(model)


def test_unknown_keys_are_listed_and_kept(tmp_path: Path, model: nn.Module, caplog: pytest.LogCaptureFixture) -> None:
    torch.save(change(something__else=torch.ones(3), another=torch.ones(2)), tmp_path / "file.pth")
    with pytest.warns(UserWarning, match="without effect: another, something"), caplog.at_level("INFO"):
        adapter = lak.load_adapter(model, tmp_path / "file.pth")
    lak.detach_adapter(model)
    assert any(
        "unknown keys, kept beside the adapter and not used: another, something.else" in m for m in caplog.messages
    )
    adapter.save_pretrained(tmp_path / "saved")
    assert read_adapter(tmp_path / "saved").state.leftover.keys() == {"another", "something.else"}


def test_a_tuned_file_with_a_gap_names_every_missing_key(tmp_path: Path) -> None:
    content = wild.chat_file()
    del content["layers.2.attention.wq_bias"], content["layers.1.ffn_norm.weight"]
    torch.save(content, tmp_path / "file.pth")
    with pytest.raises(ValueError, match=r"missing keys: .*bias of self_attn\.q_proj in layer 2") as raised:
        read_adapter(tmp_path / "file.pth")
    assert "post_attention_layernorm.weight of layer 1" in str(raised.value)


def test_v1_round_trips_to_the_bit(tmp_path: Path) -> None:
    torch.save(wild.v1_file(), tmp_path / "theirs.pth")
    official.write_v1(tmp_path / "ours.pth", read_adapter(tmp_path / "theirs.pth").state)
    theirs, ours = (torch.load(tmp_path / name, weights_only=True) for name in ("theirs.pth", "ours.pth"))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in theirs)
