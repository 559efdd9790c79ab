"""Adapters on small random transformers models: same results as the base at gate 0, right everywhere transformers goes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import llama_adapter_kernels as lak
from tests.support.small_models import CONFIGS, SHAPE, TOKENS, adapted, build


@pytest.mark.parametrize("name", CONFIGS)
def test_at_gate_zero_the_logits_are_those_of_the_base_model(name: str) -> None:
    base = build(name)(TOKENS).logits
    model, _ = adapted(name, opened=0.0)
    torch.testing.assert_close(model(TOKENS).logits, base, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_prefix_branch_is_the_paper_s(name: str) -> None:
    """One layer by hand: prefix K/V with biases and norms, without rotation, tanh(gate)."""
    model, adapter = adapted(name, layers=(1,))
    attention, layer = model.model.layers[1].self_attn, adapter.layers["1"]
    seen: list[Tensor] = []
    attention.o_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(TOKENS)
    with torch.no_grad():
        layer.gate.zero_()
    queries: list[Tensor] = []
    original = lak.zero_gate_attention
    import llama_adapter_kernels.integrations.transformers.attention as integration

    def spy(query: Tensor, *args: object, **kwargs: object) -> Tensor:
        queries.append(query)
        return original(query, *args, **kwargs)

    integration.zero_gate_attention = spy
    try:
        model(TOKENS)
    finally:
        integration.zero_gate_attention = original
    heads_kv, head_dim = model.config.num_key_value_heads, attention.head_dim
    key = layer.prompt @ attention.k_proj.weight.T + (0 if attention.k_proj.bias is None else attention.k_proj.bias)
    value = layer.prompt @ attention.v_proj.weight.T + (0 if attention.v_proj.bias is None else attention.v_proj.bias)
    key, value = (x.view(4, heads_kv, head_dim).transpose(0, 1) for x in (key, value))
    if name == "qwen3":
        key = key * torch.rsqrt(key.pow(2).mean(-1, keepdim=True) + attention.k_norm.variance_epsilon)
        key = key * attention.k_norm.weight
    key, value = (x.repeat_interleave(model.config.num_attention_heads // heads_kv, 0) for x in (key, value))
    query = queries[1]
    branch = torch.softmax(query @ key.transpose(1, 2) * attention.scaling, -1) @ value
    expected = torch.tanh(torch.tensor(0.7)) * branch.transpose(1, 2).flatten(2)
    torch.testing.assert_close(seen[0] - seen[1], expected, atol=1e-5, rtol=1e-4)


def test_llama_7b_has_1229760_trainable_parameters() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig())  # the defaults are LLaMA-7B
    adapter = lak.attach_adapter(model, lak.AdapterConfig(prefix_length=10, num_layers=30))
    assert adapter.num_parameters() == 1_229_760
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 1_229_760


def test_parameters_start_as_the_paper_says_and_stay_float32() -> None:
    model = build(dtype=torch.bfloat16)
    adapter = lak.attach_adapter(model, lak.AdapterConfig(prefix_length=40, gate_shape="scalar", num_layers=2))
    assert list(adapter.layers) == ["1", "2"]
    for layer in adapter.layers.values():
        assert layer.prompt.dtype == layer.gate.dtype == torch.float32
        assert layer.gate.shape == (1,) and (layer.gate == 0).all()
        assert abs(layer.prompt.mean()) < 0.1 and abs(layer.prompt.std() - 1) < 0.1
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        f"model.layers.{i}.self_attn.zero_gate.default.{p}" for i in (1, 2) for p in ("prompt", "gate")
    }
    assert model(TOKENS).logits.dtype == torch.bfloat16


def test_left_padded_batch_equals_one_by_one() -> None:
    model, _ = adapted()
    rows = [TOKENS[0, :22], TOKENS[0, 3:12]]
    batch = torch.zeros(2, 22, dtype=torch.long)
    mask = torch.zeros(2, 22, dtype=torch.long)
    for i, row in enumerate(rows):
        batch[i, -len(row) :], mask[i, -len(row) :] = row, 1
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(batch, attention_mask=mask, position_ids=position_ids).logits
    for i, row in enumerate(rows):
        torch.testing.assert_close(logits[i, -len(row) :], model(row[None]).logits[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["llama", "mistral sliding window", "qwen3"])
def test_generation_equals_full_passes(name: str, cache: str) -> None:
    model, _ = adapted(name)
    start = TOKENS[:, :7]
    tokens = model.generate(
        start, max_new_tokens=8, do_sample=False, cache_implementation=cache, eos_token_id=None, disable_compile=True
    )
    for _ in range(8):
        with torch.no_grad():
            start = torch.cat([start, model(start).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(tokens, start)


def test_packed_sequences_do_not_see_each_other() -> None:
    model, _ = adapted()
    rows = [TOKENS[0, :9], TOKENS[0, 2:15], TOKENS[0, :1]]
    offsets = torch.tensor([0, *[len(r) for r in rows]]).cumsum(0).int()
    logits = model(
        torch.cat(rows)[None], position_ids=torch.cat([torch.arange(len(r)) for r in rows])[None],
        cu_seq_lens_q=offsets, cu_seq_lens_k=offsets, max_length_q=13, max_length_k=13,
    ).logits[0]  # fmt: skip
    for i, row in enumerate(rows):
        torch.testing.assert_close(
            logits[offsets[i] : offsets[i + 1]], model(row[None]).logits[0], atol=1e-5, rtol=1e-4
        )


def test_prompts_and_gates_learn_in_every_step_after_an_evaluation() -> None:
    """Peers kept prefix K/V of an evaluation and stopped training."""
    model, adapter = adapted()
    optimizer = torch.optim.SGD(adapter.parameters(), 0.1)
    for _ in range(3):
        with torch.no_grad():
            before = model(TOKENS).logits
            assert torch.equal(before, model(TOKENS).logits)
        optimizer.zero_grad()
        model(TOKENS, labels=TOKENS).loss.backward()
        for name, parameter in adapter.named_parameters():
            assert parameter.grad is not None and (parameter.grad != 0).any(), name
        optimizer.step()
        with torch.no_grad():
            assert not torch.equal(before, model(TOKENS).logits)


def test_projection_may_be_any_callable() -> None:
    """As bitsandbytes and LoRA wrap them."""
    model, _ = adapted()
    expected = model(TOKENS).logits

    class Wrapped(nn.Module):
        def __init__(self, inner: nn.Linear) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    for layer in model.model.layers:
        layer.self_attn.k_proj, layer.self_attn.v_proj = (
            Wrapped(layer.self_attn.k_proj),
            Wrapped(layer.self_attn.v_proj),
        )
    assert torch.equal(model(TOKENS).logits, expected)


def test_gradient_checkpointing() -> None:
    model, adapter = adapted()
    model(TOKENS, labels=TOKENS).loss.backward()
    expected = [p.grad.clone() for p in adapter.parameters()]
    adapter.zero_grad()
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model(TOKENS, labels=TOKENS).loss.backward()
    for parameter, gradient in zip(adapter.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_compile_without_a_graph_break_and_autocast() -> None:
    model, _ = adapted()
    compiled = torch.compile(model.model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(TOKENS, use_cache=False).last_hidden_state, model.model(TOKENS, use_cache=False).last_hidden_state
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not model(TOKENS).logits.isnan().any()


def test_save_load_detach(tmp_path: Path) -> None:
    model, adapter = adapted(gate_shape="scalar", layers=(0, 2))
    expected = model(TOKENS).logits
    adapter.save_pretrained(tmp_path)
    other = build()
    base = other(TOKENS).logits
    loaded = lak.load_adapter(other, tmp_path)
    assert torch.equal(other(TOKENS).logits, expected)
    assert loaded.config == adapter.config
    lak.detach_adapter(other)
    assert torch.equal(other(TOKENS).logits, base)
    assert all(p.requires_grad for p in other.parameters())
    with pytest.raises(ValueError, match="it has none"):
        lak.detach_adapter(other)


def test_wrong_files_and_models_are_named(tmp_path: Path) -> None:
    _, adapter = adapted()
    adapter.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model with model_type llama.*this model has model_type qwen2"):
        lak.load_adapter(build("qwen2"), tmp_path)
    facts = json.loads((tmp_path / "zero_gate_adapter.json").read_text())
    facts["adapter"]["prefix_length"] = 5
    (tmp_path / "zero_gate_adapter.json").write_text(json.dumps(facts))
    model = build()
    with pytest.raises(ValueError, match=r"prompt: expected shape \[5, 48\], got \[4, 48\]"):
        lak.load_adapter(model, tmp_path)
    lak.attach_adapter(model, lak.AdapterConfig())  # the failed load left nothing behind
    (tmp_path / "zero_gate_adapter.json").write_text("{}")
    with pytest.raises(ValueError, match="expected the configuration of an adapter"):
        lak.load_adapter(build(), tmp_path)
    with pytest.raises(OSError, match="nowhere: no such file"):
        lak.load_adapter(build(), tmp_path / "nowhere")


def test_what_is_not_supported_says_so() -> None:
    model, _ = adapted()
    with pytest.raises(ValueError, match="adapter 'default': expected a name that is not taken"):
        lak.attach_adapter(model, lak.AdapterConfig())
    with pytest.raises(ValueError, match=r"num_layers: expected 1 to 3 .*, got 9"):
        lak.attach_adapter(build(), lak.AdapterConfig(num_layers=9))
    for wrong in ({"prefix_length": 0}, {"gate": "relu"}, {"gate_shape": "token"}, {"num_layers": 1, "layers": (0,)}):
        with pytest.raises(ValueError, match="expected"):
            lak.AdapterConfig(**wrong)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"softcap": 30.0}, "softcap: not supported .*a soft cap on scores"),
        ({"s_aux": torch.zeros(4)}, "s_aux: not supported .*attention sinks"),
        ({"position_bias": torch.zeros(1, 4, 22, 22)}, "position_bias: not supported .*a position bias"),
        ({"output_attentions": True}, "output_attentions: not supported"),
        ({"cache": object()}, "cache: not supported .*a paged cache"),
    ],
)
def test_what_the_hook_cannot_do_is_refused(arguments: dict[str, object], message: str) -> None:
    model, _ = adapted()
    with pytest.raises(ValueError, match=message):
        model(TOKENS, **arguments)


def test_a_model_that_wants_attention_probabilities_is_refused() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, attn_implementation="eager"))
    model.config.output_attentions = True
    with pytest.raises(ValueError, match=r"output_attentions: expected False .* got True"):
        lak.attach_adapter(model, lak.AdapterConfig())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_gate_zero_nothing_changes_in_any_bit(dtype: torch.dtype) -> None:
    """Against the same attention without a prefix, in whole passes and step by step."""
    model = build(dtype=dtype)
    adapter = lak.attach_adapter(model, lak.AdapterConfig())
    with torch.no_grad():
        logits = model(TOKENS).logits
        tokens = model.generate(TOKENS[:, :5], max_new_tokens=4, do_sample=False, output_logits=True,
                                return_dict_in_generate=True)  # fmt: skip
        for number in adapter.layers:
            del model.model.layers[int(number)].self_attn.zero_gate
        assert torch.equal(model(TOKENS).logits, logits)
        plain = model.generate(TOKENS[:, :5], max_new_tokens=4, do_sample=False, output_logits=True,
                               return_dict_in_generate=True)  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(tokens.logits, plain.logits, strict=True))


def test_models_with_other_heads_or_none() -> None:
    from transformers import LlamaForSequenceClassification, LlamaModel

    for kind in (LlamaForSequenceClassification, LlamaModel):
        model = kind(LlamaConfig(**SHAPE)).eval()
        adapter = lak.attach_adapter(model, lak.AdapterConfig(prefix_length=3, num_layers=2), trainable=[])
        before = model(TOKENS)[0]
        with torch.no_grad():
            adapter.layers["1"].gate.fill_(1.0)
        assert not torch.equal(model(TOKENS)[0], before)


def test_only_the_named_layers_have_a_prefix() -> None:
    """num_layers counts from the top."""
    model, adapter = adapted(num_layers=2, opened=0.0)
    assert list(adapter.layers) == ["1", "2"]
    states = model(TOKENS, output_hidden_states=True).hidden_states
    with torch.no_grad():
        for layer in adapter.layers.values():
            layer.gate.fill_(1.0)
    opened = model(TOKENS, output_hidden_states=True).hidden_states
    assert [torch.equal(a, b) for a, b in zip(states, opened, strict=True)] == [True, True, False, False]


def test_importing_the_package_imports_neither_transformers_nor_safetensors() -> None:
    code = "import sys, llama_adapter_kernels as lak; lak.AdapterConfig; " + (
        "print([m for m in ('transformers', 'safetensors', 'peft') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")
