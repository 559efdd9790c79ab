"""Arguments of types that nobody meant to pass get a sentence, and nothing of an adapter stays in the model."""

from typing import Any

import pytest
import torch

import llama_adapter_kernels as lak
from tests.support.several_adapters import served
from tests.support.small_models import build


def no_adapter(model: Any) -> bool:
    return not any("zero_gate" in name for name, _ in model.named_modules())


@pytest.mark.parametrize("trainable", ["head", 3, [3], [None]])
def test_trainable(trainable: Any) -> None:
    model = build("llama")
    with pytest.raises(ValueError, match="trainable: expected a list of names, got"):
        lak.attach_adapter(model, lak.AdapterConfig(), trainable=trainable)
    assert no_adapter(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("path", [None, 3, b"folder", ["folder"]])
def test_paths(path: Any) -> None:
    model = build("llama")
    with pytest.raises(ValueError, match="path: expected a folder, a file or owner/name, got"):
        lak.load_adapter(model, path)
    assert no_adapter(model)


@pytest.mark.parametrize("model", [None, 3, "llama", {}])
def test_models(model: Any) -> None:
    for call in (
        lambda: lak.attach_adapter(model, lak.AdapterConfig()),
        lambda: lak.load_adapter(model, "folder"),
        lambda: lak.set_adapter(model, "a"),
        lambda: lak.attached_adapters(model),
        lambda: lak.detach_adapter(model),
        lambda: lak.adapters_per_sequence(model, ["a"]).__enter__(),
        lambda: lak.limit_frozen_prefixes(model, 0),
    ):
        with pytest.raises(ValueError, match=f"model: expected a torch.nn.Module, got {type(model).__name__}"):
            call()


def test_names_and_conditions() -> None:
    model = served()
    before = model(torch.tensor([[1, 5, 6]])).logits
    for name in (3, ["a"], ""):
        with pytest.raises(ValueError, match="unknown; this model has 'a', 'b', 'c', 'd'"):
            lak.detach_adapter(model, name)  # type: ignore[arg-type]
    wrong: list[tuple[Any, str]] = [
        (3, "expected a list with one tensor or None per name, got int"),
        ({0: None, 1: None}, "expected a list with one tensor or None per name, got dict"),
        ([None, 3], "expected a tensor or None for sequence 1, got int"),
        (["x", None], "expected a tensor or None for sequence 0, got str"),
    ]
    for conditions, message in wrong:
        with pytest.raises(ValueError, match=f"conditions: {message}"):
            lak.adapters_per_sequence(model, ["a", "b"], conditions=conditions).__enter__()
    lak.detach_adapter(model, "c")  # no block that failed holds an adapter
    assert torch.equal(model(torch.tensor([[1, 5, 6]])).logits, before)
