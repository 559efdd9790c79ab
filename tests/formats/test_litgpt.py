"""LitGPT: its own code writes files that are read here, and reads files that are written here, with the same logits."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import llama_adapter_kernels as lak
from llama_adapter_kernels.formats import litgpt_writing
from llama_adapter_kernels.formats.reading import Choices
from llama_adapter_kernels.formats.registry import read_adapter
from tests.support.eager_llama import EPSILON, FFN, HEADS, HIDDEN, LAYERS, THETA, TOKENS, VOCABULARY, small_llama
from tests.support.wild_adapters import imported

START, PROMPTS = 1, 5


def settings(groups: int) -> dict[str, Any]:
    return {
        "n_layer": LAYERS, "n_head": HEADS, "n_embd": HIDDEN, "n_query_groups": groups, "intermediate_size": FFN,
        "padded_vocab_size": VOCABULARY, "vocab_size": VOCABULARY, "rotary_percentage": 1.0, "parallel_residual": False,
        "bias": False, "norm_class_name": "RMSNorm", "mlp_class_name": "LLaMAMLP", "norm_eps": EPSILON,
        "rope_base": int(THETA), "block_size": 64, "adapter_prompt_length": PROMPTS, "adapter_start_layer": START,
    }  # fmt: skip


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights of a transformers model by LitGPT's names."""
    named = {"transformer.wte.weight": model.model.embed_tokens.weight, "lm_head.weight": model.lm_head.weight}
    named["transformer.ln_f.weight"] = model.model.norm.weight
    for i, layer in enumerate(model.model.layers):
        at, place = layer.self_attn, f"transformer.h.{i}"
        named |= {
            f"{place}.attn.qkv.weight": torch.cat([at.q_proj.weight, at.k_proj.weight, at.v_proj.weight]),
            f"{place}.attn.proj.weight": at.o_proj.weight,
            f"{place}.mlp.fc_1.weight": layer.mlp.gate_proj.weight,
            f"{place}.mlp.fc_2.weight": layer.mlp.up_proj.weight,
            f"{place}.mlp.proj.weight": layer.mlp.down_proj.weight,
            f"{place}.norm_1.weight": layer.input_layernorm.weight,
            f"{place}.norm_2.weight": layer.post_attention_layernorm.weight,
        }
    return {name: weight.detach() for name, weight in named.items()}


def real(model: nn.Module, version: str, groups: int) -> Any:
    """LitGPT's own model with these weights, its adapter random and open."""
    module = pytest.importorskip(f"litgpt.{version}")
    torch.manual_seed(3)
    network = module.GPT(module.Config(**settings(groups))).double().eval()
    found = network.load_state_dict(base_weights(model), strict=False)
    assert not found.unexpected_keys and all(module.adapter_filter(name, None) for name in found.missing_keys)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "gating_factor" in name or "adapter_" in name:
                parameter.copy_(0.3 * torch.randn_like(parameter) + (1 if "adapter_scale" in name else 0))
    return network


def save_as_litgpt_does(network: Any, version: str, path: Path) -> None:
    import lightning

    module = pytest.importorskip(f"litgpt.{version}")
    network.float()  # this package keeps adapters in float32
    lightning.Fabric(accelerator="cpu", devices=1).save(
        path, {"model": network}, filter={"model": module.adapter_filter}
    )
    network.double()


@torch.no_grad()
def same_as(network: Any, model: nn.Module, path: Path, **choices: Any) -> lak.ZeroGateAdapter:
    """The file's adapter makes the model compute what LitGPT's network does; gone again, the model is the base model."""
    expected, base = network(TOKENS), model(TOKENS).logits
    assert (expected - base).abs().max() > 0.05
    with imported(model, path, **choices) as adapter:
        assert (model(TOKENS).logits - expected).abs().max() < 1e-5 * expected.abs().max()
    assert torch.equal(model(TOKENS).logits, base)
    return adapter


@pytest.mark.parametrize("groups", [HEADS, 2, 1])
@pytest.mark.parametrize("version", ["adapter", "adapter_v2"])
def test_real_litgpt_writes_what_we_read(tmp_path: Path, version: str, groups: int) -> None:
    model = small_llama(groups)
    network = real(model, version, groups)
    save_as_litgpt_does(network, version, tmp_path / f"lit_model.pth.{version}")
    adapter = same_as(network, model, tmp_path, **({"legacy_rows": True} if version == "adapter" else {}))
    assert adapter.config.prefix_rows == "legacy"
    assert adapter.config.layer_numbers(LAYERS) == (1, 2, 3)


@pytest.mark.parametrize("groups", [HEADS, 2, 1])
@pytest.mark.parametrize("version", ["adapter", "adapter_v2"])
def test_real_litgpt_reads_what_we_write(tmp_path: Path, version: str, groups: int) -> None:
    model = small_llama(groups)
    save_as_litgpt_does(real(model, version, groups), version, tmp_path / "theirs")
    reading = read_adapter(tmp_path / "theirs", choices=Choices(legacy_rows=True))
    reading.state.base["num_key_value_heads"] = groups
    notes = litgpt_writing.write(tmp_path / "ours", reading.state)
    theirs, ours = (torch.load(tmp_path / name, weights_only=True)["model"] for name in ("theirs", "ours"))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    module = pytest.importorskip(f"litgpt.{version}")
    other = module.GPT(module.Config(**settings(groups))).double().eval()
    other.load_state_dict({**base_weights(model), **ours})
    same_as(other, model, tmp_path / "ours", legacy_rows=True)
    assert "for LitGPT 0.5.5 or later" in notes
    assert "adapter_prompt_length=5, adapter_start_layer=1 for LitGPT" in notes
