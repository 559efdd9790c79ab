"""Checks of frozen models with quantised weights, run by test_quantised.py in a process that finds their libraries."""

import copy
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig, Trainer, TrainingArguments

import llama_adapter_kernels as lak
from llama_adapter_kernels.errors import UserError
from llama_adapter_kernels.integrations.quantised import check_gradients_pass
from llama_adapter_kernels.models import load_model, load_tokenizer
from llama_adapter_kernels.training.data import read_rows
from llama_adapter_kernels.training.held_out import split_off
from llama_adapter_kernels.training.quantisation import loading_options
from llama_adapter_kernels.training.settings import QUANTISATIONS
from llama_adapter_kernels.training.tokens import tokenize
from tests.support.quantised import INT4, INT8, KINDS, WEIGHTS_ONLY, four_bits
from tests.support.runs import QUIET, SHORT, run, weights
from tests.support.tiny_model import save_tiny_model

TOKENS = torch.arange(3, 41).repeat(2, 1)
SETTINGS = replace(SHORT, max_steps=3, layers=2, eval_fraction=0.1, eval_steps=2)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"), intermediate_size=128)  # bitsandbytes has blocks of 64


def linears(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """(parent, name) of the linear layers below the head."""
    return [
        (parent, name)
        for layer in model.model.layers
        for parent in (layer.self_attn, layer.mlp)
        for name, child in parent.named_children()
        if name.endswith("_proj")
    ]


def pair(tiny: Path, kind: str) -> tuple[nn.Module, nn.Module]:
    """(the quantised model, a plain one whose matrices are what the quantised layers do)."""
    quantised, plain = (load_model(str(tiny), torch.float32).eval() for _ in range(2))
    quantised.requires_grad_(False)
    for (parent, name), (other, _) in zip(linears(quantised), linears(plain), strict=True):
        setattr(parent, name, KINDS[kind](getattr(parent, name)))
        with torch.no_grad():
            matrix = getattr(parent, name)(torch.eye(getattr(other, name).in_features))
            assert not torch.equal(matrix.T, getattr(other, name).weight)
            getattr(other, name).weight.copy_(matrix.T)
    return quantised, plain


def results(model: nn.Module) -> dict[str, Tensor]:
    """Logits and the adapter's gradients with open gates."""
    torch.manual_seed(1)
    adapter = lak.attach_adapter(model, lak.AdapterConfig(prefix_length=3, num_layers=2))
    with torch.no_grad():
        for layer in adapter.layers.values():
            layer.gate.fill_(0.7)
    found = model(TOKENS, labels=TOKENS)
    found.loss.backward()
    gradients = {name: parameter.grad for name, parameter in adapter.named_parameters()}
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if not parameter.requires_grad)
    return {"logits": found.logits.detach(), **gradients}


@pytest.mark.filterwarnings("error:attaching an adapter froze")
@pytest.mark.parametrize("kind", KINDS)
def test_closed_gates_change_nothing(tiny: Path, kind: str) -> None:
    model, _ = pair(tiny, kind)
    with torch.no_grad():
        before = model(TOKENS).logits
        lak.attach_adapter(model, lak.AdapterConfig(prefix_length=3))
        found = model(TOKENS).logits
    # bitsandbytes' activations of eight bits take steps; attention that rounds otherwise moves some by one.
    close = 2e-2 if kind == "bitsandbytes 8 bits" else 1e-5
    assert (found - before).norm() <= close * before.norm()


@pytest.mark.parametrize("kind", WEIGHTS_ONLY)
def test_results_are_those_of_a_plain_model_with_the_same_weights(tiny: Path, kind: str) -> None:
    quantised, plain = pair(tiny, kind)
    exact = results(copy.deepcopy(plain).double())
    expected, found = results(plain), results(quantised)
    for name, value in exact.items():
        error, base = ((those[name] - value).abs().max() for those in (found, expected))
        assert error <= 2 * base + 2 * torch.finfo(torch.float32).eps * value.abs().max(), name
        assert value.norm() > 0


def test_gradients_pass_after_evaluation(tiny: Path) -> None:
    """bitsandbytes packs weights for CPUs with bfloat16 instructions, after which there are no gradients."""
    quantised, plain = pair(tiny, "bitsandbytes 4 bits")
    adapters = []
    for model in (quantised, plain):
        torch.manual_seed(1)
        adapters.append(lak.attach_adapter(model, lak.AdapterConfig(prefix_length=3, num_layers=2)))
        model.eval()
        with torch.no_grad():
            adapters[-1].layers["2"].gate.fill_(0.7)
            model(TOKENS)
        model.train()(TOKENS, labels=TOKENS).loss.backward()
    for mine, theirs in zip(*(adapter.layers["2"].parameters() for adapter in adapters), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.filterwarnings("ignore:bitsandbytes.*an autograd kernel was not registered")
def test_packed_weights_are_refused(tiny: Path) -> None:
    model = load_model(str(tiny), torch.float32)
    layer = model.model.layers[-1].mlp
    layer.up_proj = four_bits(layer.up_proj).eval()
    if not layer.up_proj.support_avx512bf16_for_cpu:
        return  # nothing packs here
    with torch.no_grad():
        model(TOKENS)
    lak.attach_adapter(model, lak.AdapterConfig(prefix_length=3))
    with pytest.raises(ValueError, match=r"mlp.up_proj of the last layer \(Linear4bit, Params4bit\) lets none pass"):
        check_gradients_pass(model)


def test_activations_of_eight_bits(tiny: Path) -> None:
    """No linear maps: gradients point where those of the plain model do."""
    quantised, plain = pair(tiny, "bitsandbytes 8 bits")
    found, expected = results(quantised), results(plain)
    for name, value in expected.items():
        assert torch.nn.functional.cosine_similarity(found[name].flatten(), value.flatten(), dim=0) > 0.98, name


FOLDERS = {
    "bnb-8bit": BitsAndBytesConfig(load_in_8bit=True),
    "bnb-4bit": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "torchao-int8": TorchAoConfig(INT8),
    "torchao-int4": TorchAoConfig(INT4),
}


def saved(tiny: Path, folder: Path, config: Any) -> Path:
    """A folder whose config.json says how its weights are quantised."""
    AutoModelForCausalLM.from_pretrained(tiny, quantization_config=config, dtype=torch.float32).save_pretrained(folder)
    for path in tiny.glob("tokenizer*"):
        shutil.copy(path, folder)
    return folder


@pytest.mark.parametrize("quantize", QUANTISATIONS)
def test_finetune_on_a_quantised_folder(tiny: Path, rows: Path, tmp_path: Path, quantize: str) -> None:
    base = saved(tiny, tmp_path / "base", FOLDERS[quantize])
    outcome = run(base, rows, tmp_path / "run", SETTINGS, execution=replace(QUIET, save_steps=2))
    assert outcome.finished and len(outcome.losses) == 3 and outcome.held_out_losses.keys() == {2, 3}
    # At step 1 the gates are 0: the loss is that of the quantised model, sequence by sequence.
    model = load_model(str(base), torch.float32).train()  # bitsandbytes would round for inference besides
    examples, _ = split_off(tokenize(read_rows(rows), load_tokenizer(str(base)), 512), 0.1, SETTINGS.seed)
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(0)).tolist()
    total, count = 0.0, 0
    for example in (examples[i] for i in order[:8]):
        with torch.no_grad():
            logits = model(torch.tensor([example.tokens])).logits[0].double()
        for i in range(example.prompt_length, len(example)):
            total -= float(logits[i - 1].log_softmax(-1)[example.tokens[i]])
            count += 1
    # bitsandbytes' eight bits round activations, and other batches otherwise.
    assert outcome.losses[1] == pytest.approx(total / count, rel=2e-3 if quantize == "bnb-8bit" else 1e-5)
    # A run that was cut goes on exactly.
    shutil.copytree(tmp_path / "run", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoint-3")
    again = run(base, rows, tmp_path / "cut", SETTINGS, execution=replace(QUIET, save_steps=2), resume=True)
    assert again.losses == outcome.losses
    for name, tensor in weights(tmp_path / "run").items():
        assert torch.equal(weights(tmp_path / "cut")[name], tensor)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = [f'{{"instruction": "Say {"word " * n}", "output": "{"word " * (1 + n % 5)}"}}' for n in range(1, 17)]
    path.write_text("\n".join(lines))
    return path


@pytest.mark.parametrize("quantize", QUANTISATIONS)
def test_quantised_when_loaded(tiny: Path, rows: Path, tmp_path: Path, quantize: str) -> None:
    """As from a folder that was quantised in the same way."""
    settings = replace(SHORT, max_steps=1, layers=2)
    base = saved(tiny, tmp_path / "base", FOLDERS[quantize])
    expected = run(base, rows, tmp_path / "folder", settings)
    settings = replace(settings, quantize=quantize)
    assert run(tiny, rows, tmp_path / "run", settings).losses == expected.losses
    with pytest.raises(UserError, match=f"--quantize {quantize}: expected a model that is not quantised, .*base is"):
        run(base, rows, tmp_path / "twice", settings)
    sharded = replace(QUIET, shard=True)
    with pytest.raises(UserError, match="--quantize, --shard: expected one of them, got both"):
        run(tiny, rows, tmp_path / "sharded", settings, execution=sharded)


def test_on_a_gpu_every_process_loads_onto_its_own(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    for device, place in (("cuda", "cuda:3"), ("cuda:1", "cuda:1")):
        options = loading_options(str(tiny), "bnb-4bit", torch.bfloat16, torch.device(device))
        assert options["device_map"] == {"": place}
        assert options["quantization_config"].bnb_4bit_compute_dtype == torch.bfloat16
    assert loading_options(str(tiny), None, torch.float32, torch.device("cuda")) == {}


def test_transformers_trainer(tiny: Path, tmp_path: Path) -> None:
    """transformers refuses quantised models that PEFT has not adapted; with the mixin it does not."""
    model = load_model(str(saved(tiny, tmp_path / "base", BitsAndBytesConfig(load_in_4bit=True))), torch.float32)
    lak.attach_adapter(model, lak.AdapterConfig(prefix_length=3))

    class AdapterTrainer(lak.AdapterTrainerMixin, Trainer):  # type: ignore[misc]
        pass

    arguments = TrainingArguments(output_dir=str(tmp_path / "run"), use_cpu=True, max_steps=1, report_to="none",
                                  disable_tqdm=True)  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in TOKENS]
    with pytest.raises(ValueError, match="purely quantized models"):
        Trainer(model=model, args=arguments, train_dataset=data)
    AdapterTrainer(model=model, args=arguments, train_dataset=data).train()
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoint-1").glob("*.safetensors")) == [
        "adapter.safetensors"
    ]


def test_weights_without_a_backward_pass_are_refused(tiny: Path) -> None:
    """As AWQ's and GPTQ's fastest kernels: what comes out of them has no history."""

    class Fused(nn.Module):
        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            self.in_features = linear.in_features
            self.register_buffer("qweight", linear.weight.detach())

        def forward(self, hidden: Tensor) -> Tensor:
            return hidden.detach() @ self.qweight.T

    model = load_model(str(tiny), torch.float32)
    model.model.layers[-1].mlp.up_proj = Fused(model.model.layers[-1].mlp.up_proj)
    model.is_quantized = True
    lak.attach_adapter(model, lak.AdapterConfig(prefix_length=3))

    class AdapterTrainer(lak.AdapterTrainerMixin, Trainer):  # type: ignore[misc]
        pass

    with pytest.raises(ValueError, match=r"mlp.up_proj of the last layer \(Fused, NoneType\) lets none pass"):
        AdapterTrainer(model=model)
