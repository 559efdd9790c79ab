"""The adapter as a PEFT method: what PEFT's own test suite asks of every method, and the results of `attach_adapter`."""

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import llama_adapter_kernels as lak
from tests.support.peft_models import CONFIG, KINDS, base_model, logits, opened, two_adapters, wrapped
from tests.support.small_models import TOKENS

peft = pytest.importorskip("peft")
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("kind", KINDS)
def test_results_are_those_of_attach_adapter(kind: str, tmp_path: Path) -> None:
    model = wrapped(kind)
    lak.attached_adapters(model)["default"].save_pretrained(tmp_path)
    other = base_model(KINDS[kind][0])
    base = logits(other)
    lak.load_adapter(other, tmp_path)
    found = logits(model)
    assert (found - base).abs().max() > 0.1
    assert torch.equal(found, logits(other))
    assert torch.equal(logits(model, None, inputs_embeds=model.get_input_embeddings()(TOKENS)), found)
    with model.disable_adapter():
        assert (logits(model) - base).abs().max() < 1e-5
    assert torch.equal(logits(model), found)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("safe", [True, False])
def test_saves_and_loads(kind: str, safe: bool, tmp_path: Path) -> None:
    model = wrapped(kind)
    expected = logits(model)
    model.save_pretrained(tmp_path, safe_serialization=safe)
    weights = tmp_path / ("adapter_model.safetensors" if safe else "adapter_model.bin")
    assert {"adapter_config.json", "README.md", weights.name} == {file.name for file in tmp_path.iterdir()}
    assert weights.stat().st_size < 100_000 < 4 * sum(parameter.numel() for parameter in model.parameters())
    keys = peft.get_peft_model_state_dict(model)
    assert all(".zero_gate" in key and "default" not in key for key in keys)
    for low in (False, True):
        loaded = peft.PeftModel.from_pretrained(base_model(KINDS[kind][0]), tmp_path, low_cpu_mem_usage=low)
        assert torch.equal(logits(loaded), expected)
        assert not any(parameter.requires_grad for parameter in loaded.parameters())
        assert {p.dtype for p in lak.attached_adapters(loaded)["default"].parameters()} == {torch.float32}
    assert peft.PeftConfig.from_pretrained(tmp_path) == loaded.peft_config["default"]
    loaded.load_adapter(tmp_path, "again", is_trainable=True)
    loaded.set_adapter("again")
    assert torch.equal(logits(loaded), expected)
    assert "library_name: peft" in (tmp_path / "README.md").read_text()


def test_a_new_process_reads_it_though_peft_comes_first(tmp_path: Path) -> None:
    model = wrapped()
    model.save_pretrained(tmp_path / "adapter")
    torch.save(logits(model), tmp_path / "expected.pt")
    (tmp_path / "whole.pickle").write_bytes(pickle.dumps(model))
    script = f"""if True:
        import peft, llama_adapter_kernels, os, pickle, torch
        from tests.support.peft_models import CONFIG, KINDS, base_model, logits, opened, two_adapters, wrapped
        from tests.support.small_models import TOKENS
        os.chdir({str(tmp_path)!r})
        expected = torch.load("expected.pt")
        model = peft.PeftModel.from_pretrained(base_model(), "adapter")
        assert torch.equal(model(TOKENS).logits, expected)
        with open("whole.pickle", "rb") as file:
            assert torch.equal(pickle.load(file)(TOKENS).logits, expected)
    """
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


def test_loading_anew_is_noticed_by_a_frozen_prefix(tmp_path: Path) -> None:
    model = wrapped()
    expected = logits(model)
    model.save_pretrained(tmp_path)
    opened(model, 7)
    lak.attached_adapters(model)["default"].freeze_prefix()
    assert not torch.allclose(logits(model), expected)
    model.load_adapter(tmp_path, "default")
    assert torch.equal(logits(model), expected)


@pytest.mark.filterwarnings("error::UserWarning")
def test_a_frozen_adapter_warns_of_nothing(tmp_path: Path) -> None:
    wrapped().save_pretrained(tmp_path)
    model = peft.PeftModel.from_pretrained(base_model(), tmp_path).train()
    model(input_ids=TOKENS)
    model.set_requires_grad("default")
    assert all(parameter.requires_grad == (".zero_gate." in name) for name, parameter in model.named_parameters())


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    wrapped().save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
    name = next(iter(tensors))
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, path)
    with pytest.raises(ValueError, match=r"adapter 'default': expected the tensors of its configuration, it misses "):
        peft.PeftModel.from_pretrained(base_model(), tmp_path)
    save_file(tensors | {"base_model.model.model.layers.0.self_attn.zero_gate.prompt": tensors[name].clone()}, path)
    with pytest.raises(ValueError, match=r"it has no place for base_model.model.model.layers.0.self_attn.zero_gate"):
        peft.PeftModel.from_pretrained(base_model(), tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_adapter_trains(kind: str) -> None:
    model = wrapped(kind).train()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        ours = ".zero_gate" in name
        assert (
            ours
            == parameter.requires_grad
            == (parameter.grad is not None)
            == (not torch.equal(parameter, before[name]))
        )
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    again = wrapped(kind).train()
    again.gradient_checkpointing_enable()
    again(input_ids=TOKENS, labels=TOKENS).loss.backward()
    for name, parameter in again.named_parameters():
        assert not parameter.requires_grad or torch.allclose(parameter.grad, found[name], atol=1e-6)
    model.zero_grad()
    with model.disable_adapter():
        assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    model = wrapped("llama", dtype)
    assert {p.dtype for p in lak.attached_adapters(model)["default"].parameters()} == {torch.float32}
    assert logits(model).dtype == dtype
    assert model.generate(TOKENS, max_new_tokens=2).shape == (2, TOKENS.shape[1] + 2)
    assert model.generate(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS), max_new_tokens=2).shape[1] == 24


@pytest.mark.parametrize("kind", ["llama", "tuned"])
def test_adapters_come_and_go(kind: str, tmp_path: Path) -> None:
    model = wrapped(kind)
    first = logits(model)
    with model.disable_adapter():
        base = logits(model)
    model.add_adapter("other", lak.ZeroGateConfig(**CONFIG | KINDS[kind][1] | {"prefix_length": 3}))
    opened(model, 2, "other")
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(".default." in name for name in trainable)
    assert torch.equal(logits(model), first)
    model.set_adapter("other")
    second = logits(model)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable and all(".other." in name for name in trainable)
    assert not torch.allclose(second, first)
    assert model.active_adapters == ["other"]
    assert model.get_model_status().available_adapters == ["default", "other"]
    model.save_pretrained(tmp_path, selected_adapters=["other"])
    assert {entry.name for entry in tmp_path.iterdir()} == {"other", "README.md"}
    model.set_adapter("default", inference_mode=True)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with pytest.warns(UserWarning, match="Setting active adapter to other"):
        model.delete_adapter("default")
    assert torch.equal(logits(model), second)
    assert model.active_adapters == ["other"] == list(model.peft_config)
    assert not [name for name, _ in model.named_parameters() if "default" in name]
    model.load_adapter(tmp_path / "other", "third")
    model.delete_adapter("third")  # one that does not run
    with pytest.raises(ValueError, match="does not exist"):
        model.delete_adapter("third")
    assert torch.equal(logits(model), second)
    plain = model.unload()
    assert (logits(plain) - base).abs().max() < 1e-5
    assert list(plain.state_dict()) == list(base_model().state_dict())
    assert all(parameter.requires_grad for parameter in plain.parameters())
    assert not lak.attached_adapters(plain)
    peft.get_peft_model(plain, lak.ZeroGateConfig(**CONFIG))


def test_the_last_adapter_may_go_and_another_come() -> None:
    model = wrapped()
    with model.disable_adapter():
        base = logits(model)
    model.delete_adapter("default")
    assert model.active_adapters == []
    assert torch.equal(logits(model.get_base_model() if model.peft_config else model.base_model.model), base)
    model.add_adapter("new", lak.ZeroGateConfig(**CONFIG))
    model.set_adapter("new")
    opened(model, 4, "new")
    assert not torch.allclose(logits(model), base)
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".zero_gate." not in name)


def test_copies_stand_alone() -> None:
    model = two_adapters()
    twin = copy.deepcopy(model)
    twin.set_adapter("other")
    assert not torch.allclose(logits(twin), logits(model))
    assert (model.active_adapters, twin.active_adapters) == (["default"], ["other"])
    twin.unload()
    assert lak.attached_adapters(model).keys() == {"default", "other"}


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_what_peft_is_refused() -> None:
    model = two_adapters()
    expected = logits(model)
    for call, message in (
        (lambda: model.merge_and_unload(), r"merging: .* nothing to merge it into; unload\(\) gives the base model back"),
        (lambda: model.merge_adapter(), "merging: a zero-gate adapter is no change of the model's weights"),
        (lambda: model.base_model.set_adapter(["default", "other"]), "expected one adapter at a time, got default, other"),
        (lambda: model.add_adapter("weight", lak.ZeroGateConfig()), "that PEFT's layers do not use .*, got 'weight'"),
        (lambda: model.add_adapter("a.b", lak.ZeroGateConfig()), "name: expected letters, digits"),
        (lambda: model.add_adapter("deep", lak.ZeroGateConfig(num_layers=9)), r"num_layers: expected 1 to 3"),
        (lambda: lak.attach_adapter(model, lak.AdapterConfig(), "x"), r"belong to PEFT, .*: add_adapter\(name, lak.Zero"),
        (lambda: lak.detach_adapter(model, "other"), r"belong to PEFT, which must know of it: delete_adapter\(name\)"),
        (lambda: lak.set_adapter(model, "other"), r"belong to PEFT, which must know of it: set_adapter\(name\)"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call()
        assert list(model.peft_config) == ["default", "other"]
        assert torch.equal(logits(model), expected)
    attached = base_model()
    lak.attach_adapter(attached, lak.AdapterConfig())
    with pytest.raises(ValueError, match="model: expected one without adapters of attach_adapter"):
        peft.get_peft_model(attached, lak.ZeroGateConfig())
    assert lak.attached_adapters(attached).keys() == {"default"}
    prompted = peft.get_peft_model(
        base_model(), peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=2, adapter_layers=1)
    )
    with pytest.raises(ValueError, match="without PEFT's AdaptionPrompt"):
        peft.get_peft_model(prompted, lak.ZeroGateConfig())
    for fields, message in (
        ({"prefix_length": 2.5}, "prefix_length: expected"),
        ({"gate": "relu"}, "gate: expected"),
        ({"tuning": 3}, "tuning: expected"),
        ({"layers": [0], "num_layers": 1}, "got both"),
    ):
        with pytest.raises(ValueError, match=message):
            lak.ZeroGateConfig(**fields)
