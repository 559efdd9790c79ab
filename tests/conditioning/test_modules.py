"""Every conditioning module against an independent eager computation from its state dict."""

import math

import pytest
import torch
from torch import Tensor

from llama_adapter_kernels.adapters.conditioning import ConditioningConfig, build_conditioning

HIDDEN, WIDTH, SLOTS = 24, 16, 5


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias


def randomised(config: ConditioningConfig) -> tuple[torch.nn.Module, dict[str, Tensor]]:
    module = build_conditioning(config).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64) / math.sqrt(parameter.shape[-1]))
    return module, dict(module.state_dict())


def test_multi_scale_is_the_papers() -> None:
    module, state = randomised(ConditioningConfig("multi_scale", WIDTH, HIDDEN, SLOTS, depths=3))
    features = torch.randn(2, 3, WIDTH, dtype=torch.float64)
    vectors = []
    for b in range(2):
        joined = torch.cat([features[b, 0], features[b, 1], features[b, 2]])
        vectors.append(state["projection.weight"] @ joined + state["projection.bias"])
    expected = torch.stack([torch.stack([vector] * SLOTS) for vector in vectors])
    torch.testing.assert_close(module(features), expected)


def test_queries_read_all_tokens() -> None:
    heads, inner = 4, 32
    config = ConditioningConfig("queries", WIDTH, HIDDEN, SLOTS, inner_size=inner, blocks=2, heads=heads)
    module, s = randomised(config)
    features = torch.randn(2, 7, WIDTH, dtype=torch.float64)

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ s[f"{name}.weight"].T + s[f"{name}.bias"]

    tokens = layer_norm(linear(features, "input_projection"), s["input_norm.weight"], s["input_norm.bias"])
    x = torch.cat([s["queries"].repeat(2, 1, 1), tokens], dim=1)
    for number in range(2):
        block = f"blocks.{number}"
        normed = layer_norm(x, s[f"{block}.norm1.weight"], s[f"{block}.norm1.bias"])
        q, k, v = linear(normed, f"{block}.qkv").chunk(3, dim=-1)
        size = inner // heads
        mixed = torch.zeros_like(x)
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            scores = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(size)
            mixed[..., part] = torch.softmax(scores, -1) @ v[..., part]
        x = x + linear(mixed, f"{block}.proj")
        normed = layer_norm(x, s[f"{block}.norm2.weight"], s[f"{block}.norm2.bias"])
        inside = linear(normed, f"{block}.fc1")
        gelu = inside * 0.5 * (1 + torch.erf(inside / math.sqrt(2)))
        x = x + linear(gelu, f"{block}.fc2")
    expected = layer_norm(linear(x[:, :SLOTS], "output_projection"), s["output_norm.weight"], s["output_norm.bias"])
    torch.testing.assert_close(module(features), expected)


def swiglu_blocks(x: Tensor, s: dict[str, Tensor], begin: str, count: int) -> Tensor:
    for number in range(count):
        name = f"{begin}blocks.{number}"
        normed = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * s[f"{name}.norm"]
        gate = normed @ s[f"{name}.f1.weight"].T
        x = x + (gate * torch.sigmoid(gate) * (normed @ s[f"{name}.f3.weight"].T)) @ s[f"{name}.f2.weight"].T
    return x


def test_imagebind_is_one_refined_vector() -> None:
    module, s = randomised(ConditioningConfig("imagebind", WIDTH, HIDDEN, 1, inner_size=40))
    features = torch.randn(3, WIDTH, dtype=torch.float64)
    vector = swiglu_blocks(features @ s["projection.weight"].T + s["projection.bias"], s, "", 3)
    torch.testing.assert_close(module(features), vector[:, None])


def test_mu_llama_mixes_the_layers() -> None:
    module, s = randomised(ConditioningConfig("mu_llama", WIDTH, HIDDEN, 2, depths=4, inner_size=40, blocks=2))
    features = torch.randn(3, 4, WIDTH, dtype=torch.float64)
    mixed = sum(s["mix.weight"][0, layer, 0] * features[:, layer] for layer in range(4)) + s["mix.bias"]
    projected = mixed @ s["refine.projection.weight"].T + s["refine.projection.bias"]
    vector = swiglu_blocks(projected, s, "refine.", 2)
    torch.testing.assert_close(module(features), torch.stack([vector, vector], dim=1))


def test_published_sizes() -> None:
    with torch.device("meta"):
        queries = build_conditioning(ConditioningConfig("queries", 768, 4096))
        mu_llama = build_conditioning(ConditioningConfig("mu_llama", 1024, 4096, 1, depths=25, modality="audio"))
    shapes = {name: tuple(tensor.shape) for name, tensor in queries.state_dict().items()}
    assert shapes["queries"] == (10, 768)
    assert shapes["blocks.7.fc1.weight"] == (3072, 768)
    assert shapes["output_projection.weight"] == (4096, 768)
    assert queries.blocks[0].heads == 16
    assert mu_llama.state_dict()["mix.weight"].shape == (1, 25, 1)
    assert mu_llama.state_dict()["refine.blocks.2.f2.weight"].shape == (4096, 16384)


@pytest.mark.parametrize("kind", ["multi_scale", "queries", "imagebind", "mu_llama"])
def test_every_parameter_gets_a_gradient(kind: str) -> None:
    config = ConditioningConfig(kind, WIDTH, HIDDEN, SLOTS, depths=2, inner_size=32, blocks=2, heads=4)
    module = build_conditioning(config)
    shape = {"queries": (2, 6, WIDTH), "imagebind": (2, WIDTH)}.get(kind, (2, 2, WIDTH))
    prompts = module(torch.randn(shape))
    assert prompts.shape == (2, SLOTS, HIDDEN)
    prompts.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kind": "clip"}, "kind: expected one of multi_scale, queries, imagebind, mu_llama, got 'clip'"),
        ({"width": 0}, "width: expected a whole number of at least 1, got 0"),
        ({"depths": 2.5}, "depths: expected a whole number of at least 1, got 2.5"),
        ({"prefix_length": True}, "prefix_length: expected a whole number of at least 1, got True"),
        ({"kind": "queries", "inner_size": 30}, "heads: expected a divisor of inner_size 30, got 16"),
        ({"modality": "video"}, "modality: expected image or audio, got 'video'"),
    ],
)
def test_configs_that_do_not_fit(wrong: dict, message: str) -> None:
    import re

    with pytest.raises(ValueError, match=re.escape(message)):
        ConditioningConfig(**{"kind": "multi_scale", "width": WIDTH, "hidden_size": HIDDEN, **wrong})
