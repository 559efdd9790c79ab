"""transformers' own methods for PEFT's adapters: a folder opens with its base, and a plain model gets adapters."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import llama_adapter_kernels as lak
from tests.support.peft_models import CONFIG, KINDS, base_model, logits, opened, wrapped

peft = pytest.importorskip("peft")


@pytest.mark.parametrize("tuning", [None, lak.Tuning(lora_rank=2)], ids=["prompts", "tuned"])
def test_a_folder_opens_with_its_base(tuning: lak.Tuning | None, tmp_path: Path) -> None:
    base_model().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = peft.get_peft_model(base, lak.ZeroGateConfig(**CONFIG, tuning=tuning)).eval()
    opened(model, 1)
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(logits(loaded), logits(model))
    assert not any(parameter.requires_grad for name, parameter in loaded.named_parameters() if ".zero_gate" in name)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "tuned"])
def test_load_adapter_reads_what_peft_wrote(kind: str, tmp_path: Path) -> None:
    model = wrapped(kind)
    model.save_pretrained(tmp_path)
    plain = base_model(KINDS[kind][0])
    adapter = lak.load_adapter(plain, tmp_path)
    assert torch.equal(logits(plain), logits(model))
    assert adapter.config == model.peft_config["default"].adapter_config()


def test_load_adapter_refuses_the_rest(tmp_path: Path) -> None:
    wrapped("tuned").save_pretrained(tmp_path / "tuned")
    with pytest.raises(ValueError, match=r"it tunes the model, .* open it by PeftModel.from_pretrained"):
        lak.load_adapter(base_model(), tmp_path / "tuned")
    wrapped().save_pretrained(tmp_path / "plain")
    file = tmp_path / "plain" / "adapter_config.json"
    whole = json.loads(file.read_text())
    for change, message in (
        ({"peft_type": "LORA"}, r"expected ZERO_GATE, got 'LORA'"),
        ({"prefix_length": 2.5}, r"expected the fields of a ZeroGateConfig .*prefix_length: expected"),
        ({"prefix_length": 5}, r"layers.1.prompt"),
        ({"num_layers": 1}, r"layers.1"),
    ):
        file.write_text(json.dumps(whole | change))
        with pytest.raises(ValueError, match=message):
            lak.load_adapter(base_model(), tmp_path / "plain")


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_adapters_on_a_plain_model(tmp_path: Path) -> None:
    model = base_model()
    base = logits(model)
    for name in ("one", "two"):
        model.add_adapter(lak.ZeroGateConfig(**CONFIG), name)
        opened(model, len(name) + ord(name[0]), name)
    each = {}
    for name in ("one", "two"):
        model.set_adapter(name)
        each[name] = logits(model)
        assert {key.split(".")[-2] for key, p in model.named_parameters() if p.requires_grad} == {name}
    assert not torch.allclose(each["one"], each["two"])
    model.disable_adapters()
    assert (logits(model) - base).abs().max() < 1e-5
    model.enable_adapters()
    assert torch.equal(logits(model), each["two"])
    model.save_pretrained(tmp_path)  # the active one
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {file.name for file in tmp_path.iterdir()}
    model.delete_adapter("one")
    assert lak.attached_adapters(model).keys() == {"two"}
    model.load_adapter(tmp_path, "again")
    model.set_adapter("again")
    assert torch.equal(logits(model), each["two"])
