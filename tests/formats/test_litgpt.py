"""LitGPT: its own code writes files that are read here, and reads files that are written here, with the same logits."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

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


@pytest.mark.parametrize("groups", [HEADS, 2, 1])
@torch.no_grad()
def test_real_litgpt_writes_what_we_read(tmp_path: Path, groups: int) -> None:
    model = small_llama(groups)
    network = real(model, "adapter", groups)
    save_as_litgpt_does(network, "adapter", tmp_path / "lit_model.pth.adapter")
    expected, base = network(TOKENS), model(TOKENS).logits
    assert (expected - base).abs().max() > 0.05
    with imported(model, tmp_path, legacy_rows=True):
        found = model(TOKENS).logits
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
