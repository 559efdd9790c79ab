"""The adapter as a PEFT method: batches that mix adapters, and heads that train along."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

import llama_adapter_kernels as lak
from tests.support.peft_models import logits, opened, two_adapters
from tests.support.small_models import TOKENS

peft = pytest.importorskip("peft")


def test_batches_that_mix_adapters() -> None:
    model = two_adapters()
    names = ["other", "__base__", "default", "other"]
    tokens = torch.cat([TOKENS, TOKENS.flip(1)])
    rows, answers = [], []
    call = {"max_new_tokens": 4, "do_sample": False, "min_new_tokens": 4}
    for name, row in zip(names, tokens, strict=True):
        if name == "__base__":
            with model.disable_adapter():
                rows.append(logits(model, row[None]))
                answers.append(model.generate(row[None], num_beams=2, **call))
        else:
            model.set_adapter(name)
            rows.append(logits(model, row[None]))
            answers.append(model.generate(row[None], num_beams=2, **call))
    assert torch.allclose(logits(model, tokens, adapter_names=names), torch.cat(rows), atol=1e-5)
    assert torch.equal(model.generate(tokens, adapter_names=names, num_beams=2, **call), torch.cat(answers))
    model.train()
    model(input_ids=tokens, labels=tokens, adapter_names=names).loss.backward()  # the active one learns
    grads = {name.split(".")[-2] for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert grads == {"other"}
    for wrong, message in (
        (["default"] * 3, "expected one adapter for each of the 4 sequences of the batch, got 3"),
        (["default", "x", "x", "x"], "adapter 'x': unknown"),
        ("default", "adapter_names: expected a list with one name per sequence, got str"),
    ):
        with pytest.raises(ValueError, match=message):
            logits(model, tokens, adapter_names=wrong)


def test_a_head_that_trains_and_travels_along(tmp_path: Path) -> None:
    def classifier() -> nn.Module:
        torch.manual_seed(0)
        return BertForSequenceClassification(
            BertConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32)
        ).eval()

    config = lak.ZeroGateConfig(prefix_length=3, task_type="SEQ_CLS")
    model = peft.get_peft_model(classifier(), config)
    assert {name.split(".")[2] for name, p in model.named_parameters() if p.requires_grad} == {"bert", "classifier"}
    model.add_adapter("other", lak.ZeroGateConfig(prefix_length=2, task_type="SEQ_CLS"))
    for name, seed in (("default", 1), ("other", 2)):
        model.set_adapter(name)
        opened(model, seed, name)
        with torch.no_grad():
            model.base_model.model.classifier.weight.add_(torch.randn(2, 32))
    model(input_ids=TOKENS, labels=torch.tensor([0, 1])).loss.backward()
    each = {"__base__": logits(classifier())}
    for name in ("default", "other"):
        model.set_adapter(name)
        each[name] = logits(model)
    tokens, names = TOKENS[[0, 0, 0]], ["other", "__base__", "default"]
    found = logits(model, tokens, adapter_names=names)
    assert torch.allclose(found, torch.stack([each[name][0] for name in names]), atol=1e-5)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(classifier(), tmp_path / "other")
    assert torch.equal(logits(loaded), each["other"])
    plain = model.unload()
    assert not torch.equal(plain.classifier.weight, classifier().classifier.weight)  # it stays, as with PEFT's methods
    assert all(parameter.requires_grad for parameter in plain.parameters())
