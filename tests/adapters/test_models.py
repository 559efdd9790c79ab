"""Which models take adapters: own architectures, wrapped projections, dropout, refusals in one sentence."""

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import llama_adapter_kernels as lak
from llama_adapter_kernels.integrations import models_page, registry
from llama_adapter_kernels.integrations.transformers import dropout
from llama_adapter_kernels.integrations.transformers.architectures import CANNOT
from tests.adapters.test_architectures import Expected, answer, close, open_gates
from tests.support.architectures import EXAMPLES, GROUPED, HEADS, HIDDEN, IMAGE, WORDS, build, inputs

ROOT = Path(__file__).parents[2]
CONFIG = lak.AdapterConfig(prefix_length=3)


def test_every_architecture_has_an_example_and_a_line_in_the_docs() -> None:
    known = {row.model_type for row in registry.known_architectures() if row.kind != "timm"}
    assert known == {example.model_type for example in EXAMPLES.values()}
    assert (ROOT / "docs" / "models.md").read_text() == models_page.page(), (
        "make it again: python -m " + models_page.__name__
    )


@pytest.mark.parametrize("kind", sorted(CANNOT))
def test_what_cannot_be_right_says_why(kind: str) -> None:
    class Model(nn.Module):
        config = type("Config", (), {"model_type": kind})

    with pytest.raises(ValueError, match=re.escape(f"a {kind} cannot take an adapter: {CANNOT[kind]}")) as raised:
        lak.attach_adapter(Model(), CONFIG)
    assert str(raised.value).count(".") == 0


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (hf.Gemma3TextConfig(**GROUPED, attn_logit_softcapping=30.0), "soft cap"),
        (hf.FalconConfig(**WORDS, alibi=True), "ALiBi"),
        (hf.Gemma2Config(**GROUPED), "soft cap"),
        (hf.DebertaV2Config(**WORDS), "disentangled"),
        (hf.BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=4), "ALiBi"),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_models_and_configurations_that_cannot_be_right(config: Any, reason: str) -> None:
    model = hf.AutoModel.from_config(config)
    with pytest.raises(ValueError, match=f"cannot take an adapter: .*{reason}"):
        lak.attach_adapter(model, CONFIG)
    assert not any("zero_gate" in name for name, _ in model.named_modules())


def test_models_of_unknown_types_and_of_several_parts() -> None:
    with pytest.raises(
        ValueError, match=r"expected one of a known type \(.*llama.*\), got Linear; lak.register_architec"
    ):
        lak.attach_adapter(nn.Linear(2, 2), CONFIG)
    with pytest.raises(ValueError, match=r"model: expected a torch\.nn\.Module, got str"):
        lak.attach_adapter("llama", CONFIG)
    clip = hf.CLIPModel(hf.CLIPConfig(text_config=WORDS, vision_config=IMAGE))
    with pytest.raises(
        ValueError, match=r"a clip has several parts; attach to one of them: model.vision_model, model.text_"
    ):
        lak.attach_adapter(clip, CONFIG)
    lak.attach_adapter(clip.vision_model, CONFIG)
    lak.attach_adapter(clip.text_model, CONFIG)
    with pytest.raises(ValueError, match="expected the part that is meant, several have adapters"):
        lak.set_adapter(clip, None)
    clip(input_ids=torch.full((1, 4), 3), pixel_values=torch.randn(1, 3, 16, 16)).logits_per_image.sum().backward()
    assert all(p.grad is not None for n, p in clip.named_parameters() if "zero_gate" in n)


def test_an_adaption_prompt_of_peft_is_in_the_way() -> None:
    from peft import AdaptionPromptConfig, get_peft_model

    model = get_peft_model(
        build("llama")[0], AdaptionPromptConfig(adapter_len=2, adapter_layers=1, task_type="CAUSAL_LM")
    )
    with pytest.raises(ValueError, match="expected one without PEFT's AdaptionPrompt"):
        lak.attach_adapter(model, CONFIG)


class OwnAttention(nn.Module):
    """Fused groups, and a key norm of its own."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config, self.is_causal, self.num_key_value_groups = config, True, 2
        self.qkv = nn.Linear(HIDDEN, 8 * (HEADS + 2 * 2))
        self.knorm = nn.LayerNorm(8)
        self.out = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        q, k, v = self.qkv(x).unflatten(-1, (2, 4, 8)).split([2, 1, 1], -2)
        q, k, v = (t.flatten(2, 3).transpose(1, 2) for t in (q, k, v))
        attend = hf.modeling_utils.ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, None)
        return self.out(attend(self, q, self.knorm(k), v, None, scaling=8**-0.5, **kwargs)[0].flatten(2)), None


class OwnModel(hf.PreTrainedModel):
    config_class, _supports_sdpa = hf.PreTrainedConfig, True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.blocks = nn.ModuleList(nn.ModuleDict({"att": OwnAttention(config)}) for _ in range(2))

    def forward(self, inputs_embeds: Tensor, **kwargs: Any) -> tuple[Tensor]:
        for block in self.blocks:
            inputs_embeds = inputs_embeds + block["att"](inputs_embeds, **kwargs)[0]
        return (inputs_embeds,)


def test_an_architecture_of_one_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_known", dict(registry._known))
    config = hf.PreTrainedConfig(hidden_size=HIDDEN, num_attention_heads=HEADS, num_key_value_heads=2)
    config.model_type, config._attn_implementation = "own", "sdpa"
    model = OwnModel(config)
    with pytest.raises(ValueError, match=r"got own; lak\.register_architecture makes another one known"):
        lak.attach_adapter(model, CONFIG)
    own = lak.Architecture("own", "blocks.*.att", lak.Fused("qkv", "groups", key_norm="knorm"), causal=True)
    lak.register_architecture(own)
    with pytest.raises(ValueError, match="model_type 'own': known already; replace=True replaces it"):
        lak.register_architecture(own)
    x = torch.randn(2, 5, HIDDEN)
    base = model(inputs_embeds=x)[0]
    adapter = lak.attach_adapter(model, CONFIG)
    close(model(inputs_embeds=x)[0], base)
    open_gates(adapter)
    got = model(inputs_embeds=x)[0]
    lak.detach_adapter(model)
    for block, layer in zip(model.blocks, adapter.layers.values(), strict=True):  # the same by hand
        module = block["att"]
        q = module.qkv(x).unflatten(-1, (2, 4, 8))[..., :2, :].flatten(2, 3).transpose(1, 2)
        k, v = module.qkv(layer.prompt).unflatten(-1, (2, 4, 8))[..., 2:, :].permute(2, 1, 0, 3).repeat_interleave(2, 1)
        branch = (q @ module.knorm(k).mT * 8**-0.5).softmax(-1) @ v
        x = (
            x
            + module(x)[0]
            + (layer.effective_gate().view(-1, 1, 1) * branch).transpose(1, 2).flatten(2) @ module.out.weight.T
        )
    close(got, x)
    lak.register_architecture(lak.Architecture("own", "blocks.*.nothing", lak.Fused("qkv"), causal=True), replace=True)
    with pytest.raises(ValueError, match=r"expected the attention modules of a own at blocks.\*.nothing of OwnModel"):
        lak.attach_adapter(model, CONFIG)
    lak.register_architecture(lak.Architecture("own", "blocks.*.att", lak.Separate(), causal=True), replace=True)
    with pytest.raises(ValueError, match="expected layer 0's OwnAttention to have k_proj, it has none"):
        lak.attach_adapter(model, CONFIG)
    lak.register_architecture(
        lak.Architecture("own", "blocks.*.att.out", lak.Fused("weight"), causal=True), replace=True
    )
    with pytest.raises(ValueError, match="expected Linear to call transformers' attention interface"):
        lak.attach_adapter(model, CONFIG)
    assert not any("zero_gate" in name for name, _ in model.named_modules())


@pytest.mark.parametrize("field", [{"model_type": ""}, {"attention": "layers.self_attn"}, {"project": "k_proj"}])
def test_descriptions_that_describe_nothing(field: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(field))}: expected"):
        lak.Architecture(**{"model_type": "x", "attention": "l.*", "project": lak.Separate(), "causal": True} | field)


@pytest.mark.parametrize("name", ["phi3", "gpt2", "gpt_neox", "distilbert"])
def test_lora_on_fused_and_other_projections(name: str) -> None:
    """Prompts go through LoRA as words do: merging it into the weights changes nothing."""
    from peft import LoraConfig, get_peft_model

    targets = {
        "phi3": ["qkv_proj"],
        "gpt2": ["c_attn"],
        "gpt_neox": ["query_key_value"],
        "distilbert": ["k_lin", "v_lin"],
    }
    model = get_peft_model(build(name)[0], LoraConfig(target_modules=targets[name], init_lora_weights=False)).eval()
    adapter = lak.attach_adapter(model, CONFIG, trainable=[])
    open_gates(adapter)
    expected = answer(model, **inputs(name))
    merged = model.merge_and_unload()
    close(answer(merged, **inputs(name)), expected)


@pytest.mark.parametrize("name", ["gpt2", "bert", "llama"])
def test_attention_dropout_drops_words_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both halves by hand: words as PyTorch drops them with this seed, the prefix branch as without dropout."""
    model, _ = build(name)
    adapter = lak.attach_adapter(model, CONFIG, trainable=[])
    open_gates(adapter)
    module = dict(model.named_modules())[next(n for n, m in model.named_modules() if "zero_gate" in m._modules)]
    from llama_adapter_kernels.integrations.transformers import attention as hook

    dropout._say_once.cache_clear()
    heads = 2 if name == "llama" else HEADS
    q, k, v = torch.randn(2, HEADS, 6, 8), torch.randn(2, heads, 6, 8), torch.randn(2, heads, 6, 8)
    arguments = {"scaling": 0.3, "is_causal": True, "zero_gate_routing": None}
    torch.manual_seed(1)
    with pytest.warns(UserWarning, match="attention dropout: computed by scaled_dot_product_attention"):
        got = hook.attention(module, q, k, v, None, dropout=0.4, **arguments)[0]
    torch.manual_seed(1)
    words = nn.functional.scaled_dot_product_attention(q, k, v, None, 0.4, True, scale=0.3, enable_gqa=True)
    branch = hook.attention(module, q, k[:, :, :0], v[:, :, :0], None, **arguments)[0]
    close(got, words.transpose(1, 2) + branch)
    with pytest.raises(ValueError, match=r"attention dropout: expected 0 for packed sequences, got 0\.4"):
        hook.attention(module, q, k, v, None, dropout=0.4, cu_seq_lens_q=torch.tensor([0, 12]), **arguments)


def test_attention_dropout_in_training_and_with_padding() -> None:
    config = hf.BertConfig(**WORDS, attention_probs_dropout_prob=0.5, hidden_dropout_prob=0.0)
    model = hf.BertModel(config)
    open_gates(lak.attach_adapter(model, CONFIG, trainable=[]))
    ids, mask = torch.full((2, 6), 7), torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.train()
        one, two = (model(ids, attention_mask=mask)[0] for _ in range(2))
        assert not torch.equal(one, two)
        one.sum().backward()
        other = ids.clone()
        other[1, 3:] = 9
        torch.manual_seed(0)
        hidden = model(ids, attention_mask=mask)[0]
        torch.manual_seed(0)
        close(model(other, attention_mask=mask)[0][mask.bool()], hidden[mask.bool()])
    model.eval()
    assert torch.equal(model(ids, attention_mask=mask)[0], model(ids, attention_mask=mask)[0])


def test_llava_with_a_picture_generates() -> None:
    model, _ = build("llama of llava")
    adapter = lak.attach_adapter(model, CONFIG, trainable=[])
    open_gates(adapter)
    picture = {"pixel_values": torch.randn(1, 3, 16, 16)}
    ids = torch.tensor([[1, 63, 63, 63, 63, 5, 6, 7]])
    got = model.generate(input_ids=ids, **picture, max_new_tokens=3, do_sample=False, eos_token_id=None)
    for _ in range(3):
        ids = torch.cat([ids, model(input_ids=ids, **picture).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(got, ids)
    expected = Expected("llama of llava", adapter)
    close(answer(model, input_ids=ids, **picture), expected({"input_ids": ids, **picture}))


@pytest.mark.parametrize("name", ["qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text"])
def test_qwen_with_a_picture_generates(name: str) -> None:
    """Four patches become four tokens, whose positions are those of a grid (M-RoPE)."""
    model, _ = build(name)
    adapter = lak.attach_adapter(model, CONFIG, trainable=[])
    open_gates(adapter)
    expected = Expected(name, adapter)
    model.config.image_token_id = expected.model.config.image_token_id = 60
    picture = {"pixel_values": torch.randn(4, 48), "image_grid_thw": torch.tensor([[1, 2, 2]])}
    ids = torch.tensor([[1, 60, 60, 60, 60, 5, 6, 7]])

    def batch(ids: Tensor) -> dict[str, Tensor]:
        return {"input_ids": ids, "mm_token_type_ids": (ids == 60).int(), **picture}

    got = model.generate(**batch(ids), max_new_tokens=3, do_sample=False, eos_token_id=None)
    close(answer(model, **batch(ids)), expected(batch(ids)))
    for _ in range(3):
        ids = torch.cat([ids, answer(model, **batch(ids))[:, -1:].argmax(-1)], 1)
    assert torch.equal(got, ids)
