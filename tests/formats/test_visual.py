"""Image and sound parts of official files become a conditioning: prompts equal an eager computation from their names."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, silu

import llama_adapter_kernels as lak
from llama_adapter_kernels.formats.visual import find_conditioning
from tests.support import wild_adapters as wild
from tests.support.eager_llama import HIDDEN, LAYERS, TOKENS, small_llama

INNER, WIDTH, HEADS = 32, 12, 16


def random(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    return {name: ("norm" in name and "weight" in name) + 0.3 * torch.randn(shape) for name, shape in shapes.items()}


def visual_parts(prompts: int = wild.PROMPTS, blocks: int = 2) -> dict[str, Tensor]:
    shapes: dict[str, tuple[int, ...]] = {
        "visual_query.weight": (prompts, INNER), "clip_proj.weight": (INNER, WIDTH), "clip_proj.bias": (INNER,),
        "clip_proj_norm.weight": (INNER,), "clip_proj_norm.bias": (INNER,), "visual_proj.weight": (HIDDEN, INNER),
        "visual_proj.bias": (HIDDEN,), "visual_proj_norm.weight": (HIDDEN,), "visual_proj_norm.bias": (HIDDEN,),
    }  # fmt: skip
    for n in range(blocks):
        sizes = {"norm1": (INNER,), "attn.qkv": (3 * INNER, INNER), "attn.proj": (INNER, INNER), "norm2": (INNER,)}
        sizes |= {"mlp.fc1": (4 * INNER, INNER), "mlp.fc2": (INNER, 4 * INNER)}
        for name, shape in sizes.items():
            shapes |= {f"visual_blocks.{n}.{name}.weight": shape, f"visual_blocks.{n}.{name}.bias": shape[:1]}
    return random(shapes)


def visual_prompts(w: dict[str, Tensor], tokens: Tensor, blocks: int = 2) -> Tensor:
    """Linear, LayerNorm; learned queries before the tokens; pre-norm blocks; the queries out; Linear, LayerNorm."""

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(name: str, x: Tensor) -> Tensor:
        return layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])

    x = norm("clip_proj_norm", linear("clip_proj", tokens))
    x = torch.cat([w["visual_query.weight"].expand(len(x), -1, -1), x], 1)
    for n in range(blocks):
        at = f"visual_blocks.{n}"
        query, key, value = linear(f"{at}.attn.qkv", norm(f"{at}.norm1", x)).chunk(3, -1)
        query, key, value = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (query, key, value))
        weights = (query @ key.mT / (INNER // HEADS) ** 0.5).softmax(-1)
        x = x + linear(f"{at}.attn.proj", (weights @ value).transpose(1, 2).flatten(2))
        x = x + linear(f"{at}.mlp.fc2", gelu(linear(f"{at}.mlp.fc1", norm(f"{at}.norm2", x))))
    return norm("visual_proj_norm", linear("visual_proj", x[:, : wild.PROMPTS]))


@torch.no_grad()
def test_multimodal_files_see(tmp_path: Path) -> None:
    content = {name: value for name, value in wild.multimodal_file().items() if not name.startswith(("visual", "clip"))}
    parts = visual_parts()
    torch.save({"model": content | parts | {"unknown": torch.ones(1)}}, tmp_path / "7B.pth")
    model = small_llama().float()
    with pytest.warns(UserWarning, match="kept beside the adapter"):
        adapter = lak.load_adapter(model, tmp_path / "7B.pth")
    conditioning = lak.load_conditioning(model, tmp_path / "7B.pth")
    assert adapter.leftover.keys() == {"unknown"}
    tokens = torch.randn(2, 7, WIDTH)
    expected = visual_prompts(parts, tokens)
    assert torch.allclose(conditioning(tokens), expected, atol=1e-4)
    with conditioning.given(list(tokens)):
        seen = model(TOKENS).logits
    with lak.adapters_per_sequence(model, ["default"] * 2, conditions=list(expected)):
        assert torch.allclose(model(TOKENS).logits, seen, atol=1e-4)
    assert not torch.allclose(model(TOKENS).logits, seen, atol=1e-2)
    adapter.save_pretrained(tmp_path / "saved")
    other = small_llama().float()
    with pytest.warns(UserWarning, match="without effect: unknown"):
        lak.load_adapter(other, tmp_path / "saved")
    again = lak.load_conditioning(other, tmp_path / "saved")
    assert torch.equal(again(tokens), conditioning(tokens))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["imagebind", "mu_llama"])
def test_embeddings_of_any_modality(kind: str) -> None:
    name = "image_bind" if kind == "imagebind" else "mu_mert"
    shapes: dict[str, tuple[int, ...]] = {f"{name}_proj.weight": (HIDDEN, WIDTH), f"{name}_proj.bias": (HIDDEN,)}
    for n in (1, 2, 3):
        shapes |= {f"{name}_norm_{n}.weight": (HIDDEN,), f"{name}_f1_{n}.weight": (40, HIDDEN)}
        shapes |= {f"{name}_f2_{n}.weight": (HIDDEN, 40), f"{name}_f3_{n}.weight": (40, HIDDEN)}
    if kind == "mu_llama":
        shapes |= {"mu_mert_agg.weight": (1, 25, 1), "mu_mert_agg.bias": (1,)}
    torch.manual_seed(9)
    w = random(shapes)
    found = find_conditioning(w, HIDDEN, 1)
    assert found is not None and found.config.kind == kind and found.used == w.keys()
    from llama_adapter_kernels.adapters.conditioning import build_conditioning

    module = build_conditioning(found.config)
    module.load_state_dict(found.tensors)
    features = torch.randn(2, 25, WIDTH) if kind == "mu_llama" else torch.randn(2, WIDTH)
    x = features
    if kind == "mu_llama":
        x = torch.einsum("n,bnw->bw", w["mu_mert_agg.weight"][0, :, 0], features) + w["mu_mert_agg.bias"]
    x = x @ w[f"{name}_proj.weight"].T + w[f"{name}_proj.bias"]
    for n in (1, 2, 3):
        y = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{name}_norm_{n}.weight"]
        x = (
            x
            + (silu(y @ w[f"{name}_f1_{n}.weight"].T) * (y @ w[f"{name}_f3_{n}.weight"].T))
            @ w[f"{name}_f2_{n}.weight"].T
        )
    assert torch.allclose(module(features)[:, 0], x, rtol=1e-4, atol=1e-3)


def test_parts_that_do_not_fit_are_named() -> None:
    parts = visual_parts()
    del parts["visual_blocks.1.mlp.fc1.weight"]
    with pytest.raises(ValueError, match=r"blocks\.1\.fc1\.weight \(128, 32\), got nothing"):
        find_conditioning(parts, HIDDEN, wild.PROMPTS)
    huge = visual_parts() | {"clip_proj.weight": torch.ones(1_000_000, 1)}
    with pytest.raises(ValueError, match="expected for a conditioning queries"):
        find_conditioning(huge, HIDDEN, wild.PROMPTS)
    assert find_conditioning({"something": torch.ones(1)}, HIDDEN, LAYERS) is None
