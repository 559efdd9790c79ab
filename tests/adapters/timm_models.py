"""Checks of timm's models, run by test_timm.py in a process that can import timm."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import llama_adapter_kernels as lak

SMALL = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 3}
KINDS: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {},
    "vit_base_patch16_siglip_224": {},
    "deit3_small_patch16_224": {},
    "deit_tiny_distilled_patch16_224": {},
    "vit_tiny_patch16_224 with norms": {"qk_norm": True},
}
PICTURES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name.partition(" ")[0], **SMALL, **KINDS[name]).eval()
    for parameter in model.parameters():
        parameter.data = parameter * 3 if parameter.dim() > 1 else parameter + 0.1 * torch.randn_like(parameter)
    return model


def expected(model: nn.Module, adapter: lak.ZeroGateAdapter) -> tuple[Tensor, list[Tensor]]:
    """Logits of the plain model with the formula written out, and the gradients of prompts and gates."""
    leaves = [p.detach().clone().requires_grad_() for p in adapter.parameters()]
    prompts, gates = leaves[::2], leaves[1::2]

    def forward(module: Any, number: int, x: Tensor) -> Tensor:
        def split(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            q, k, v = (rows @ module.qkv.weight.T + module.qkv.bias).chunk(3, -1)
            q, k, v = (t.unflatten(-1, (4, 8)).transpose(1, 2) for t in (q, k, v))
            return module.q_norm(q), module.k_norm(k), v

        q, k, v = split(x)
        _, prefix_k, prefix_v = split(prompts[number][None])
        words = (q @ k.mT * module.scale).softmax(-1) @ v
        branch = (q @ prefix_k.mT * module.scale).softmax(-1) @ prefix_v
        return module.proj((words + torch.tanh(gates[number]).view(-1, 1, 1) * branch).transpose(1, 2).flatten(2))

    for number, block in enumerate(model.blocks):
        block.attn.forward = lambda x, number=number, module=block.attn, **_: forward(module, number, x)
    logits = model(PICTURES)
    logits.square().sum().backward()
    return logits, [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("name", KINDS)
def test_timm(name: str, tmp_path: Path) -> None:
    model = build(name)
    base = model(PICTURES).detach()
    with pytest.warns(UserWarning, match=r"froze (head|head_dist)\.weight"):
        lak.attach_adapter(model, lak.AdapterConfig(prefix_length=3))
    lak.detach_adapter(model)
    assert torch.equal(model(PICTURES), base) and all(p.requires_grad for p in model.parameters())
    adapter = lak.attach_adapter(model, lak.AdapterConfig(prefix_length=3), trainable=["head*"])
    torch.testing.assert_close(model(PICTURES), base, atol=1e-5, rtol=1e-4)
    for layer in adapter.layers.values():
        nn.init.uniform_(layer.gate, 0.5, 1.5)
    got = model(PICTURES)
    got.square().sum().backward()
    wanted, gradients = expected(build(name), adapter)
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
    for parameter, gradient in zip(adapter.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-4 * float(gradient.abs().max()), rtol=1e-3)
    learning = {n for n, p in model.named_parameters() if p.grad is not None}
    assert all("zero_gate" in n or n.startswith("head") for n in learning) and len(learning) >= 4 + 2
    adapter.save_pretrained(tmp_path)
    other = build(name)
    lak.load_adapter(other, tmp_path, trainable=[])
    assert torch.equal(other(PICTURES), got)
    for copied in (copy.deepcopy(other), pickle.loads(pickle.dumps(other))):
        assert torch.equal(copied(PICTURES), got)
    lak.detach_adapter(other)
    assert torch.equal(other(PICTURES), base)


def test_adapters_per_picture() -> None:
    model = build("vit_tiny_patch16_224")
    base = model(PICTURES)
    for name in ("a", "b"):
        adapter = lak.attach_adapter(model, lak.AdapterConfig(prefix_length=3), name, trainable=[])
        for layer in adapter.layers.values():
            nn.init.ones_(layer.gate)
    alone = {}
    for name in ("a", "b"):
        lak.set_adapter(model, name)
        alone[name] = model(PICTURES)
    with lak.adapters_per_sequence(model, ["b", None]):
        mixed = model(PICTURES)
    torch.testing.assert_close(mixed, torch.stack([alone["b"][0], base[1]]), atol=1e-5, rtol=1e-4)


def test_other_attention_is_refused() -> None:
    model = timm.create_model("vit_tiny_patch16_224", **SMALL)
    model.blocks[1].attn = nn.Identity()
    with pytest.raises(ValueError, match="expected layer 1's attention to be Attention, got Identity"):
        lak.attach_adapter(model, lak.AdapterConfig())
    with pytest.raises(ValueError, match="expected one of a known type"):
        lak.attach_adapter(timm.create_model("resnet18"), lak.AdapterConfig())
