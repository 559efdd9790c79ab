"""Tuning that says nothing, models without the part that is to be tuned, and files that tune something else."""

from pathlib import Path

import pytest
from torch import nn

import llama_adapter_kernels as lak
from tests.support.small_models import build
from tests.support.v2_adapters import V2, v2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bias": "q_proj"}, "bias: expected true, false or names of linears, got 'q_proj'"),
        ({"bias": ()}, "bias: expected true, false or names"),
        ({"scale": "both"}, "scale: expected input, output, none, got 'both'"),
        ({"prompts": None}, "prompts: expected base, tuned, got None"),
        ({"norms": 1}, "norms: expected true or false, got 1"),
        ({"lora_rank": -1}, "lora_rank: expected a whole number from 0"),
        ({"lora_rank": 2.0}, "lora_rank: expected a whole number from 0"),
        (
            {"bias": False, "scale": "none", "norms": False, "lora_rank": 0, "new_gate": False},
            "expected at least one of them, got none",
        ),
        ({"head": True, "bias": False, "scale": "none"}, "head: expected bias or scale with it"),
    ],
    ids=str,
)
def test_choices_that_are_none(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lak.Tuning(**arguments)


def test_models_that_have_no_such_part() -> None:
    model = build()
    with pytest.raises(ValueError, match=r"tuning\.bias: expected names of the model's linears, got c_attn"):
        lak.attach_adapter(model, lak.AdapterConfig(tuning=lak.Tuning(bias=("c_attn", "q_proj"))))
    with pytest.raises(ValueError, match=r"tuning\.head: expected a model with an output head"):
        lak.attach_adapter(model.model, lak.AdapterConfig(tuning=lak.Tuning(head=True)))
    lak.attach_adapter(model, V2)  # the failed ones left nothing behind


def test_files_that_tune_something_else(tmp_path: Path) -> None:
    model = build()
    adapter = v2(model)
    adapter.save_pretrained(tmp_path)
    other = build("llama multi-head with biases")
    with pytest.raises(
        ValueError, match="made for a model with num_key_value_heads 2; this model has num_key_value_heads 4"
    ):
        lak.load_adapter(other, tmp_path)
    wider = build()
    wider.model.layers[1].mlp.up_proj = nn.Linear(48, 80, bias=False)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.bias: this model has shape \[80\], got \[64\]"):
        lak.load_adapter(wider, tmp_path)
    assert not lak.attached_adapters(wider)
