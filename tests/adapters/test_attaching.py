"""What attaching changes in a model, and what others do to the model afterwards."""

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, LlamaForCausalLM

import llama_adapter_kernels as lak
from tests.support.small_models import CONFIGS, TOKENS, adapted, build


def logits(model: nn.Module, **arguments: object) -> Tensor:
    with torch.no_grad():
        return model(TOKENS[:, :10], **arguments).logits


def test_an_integer_mask_is_no_message() -> None:
    model, _ = adapted()
    mask = torch.ones(10, 10).tril().bool()[None, None]
    mask[..., :4] = False
    assert not torch.equal(logits(model, attention_mask=mask), logits(model))
    for dtype in (torch.int32, torch.int64, torch.int16):
        with pytest.raises(
            ValueError, match=r"attn_mask: expected bool, float32, bfloat16, float16 or float64, got torch\.int"
        ):
            logits(model, attention_mask=mask.to(dtype))
        for shape in ((2, 1, 1, 2), (1, 1, 3, 11)):  # as compact masks once were
            with pytest.raises(ValueError, match="attn_mask: expected"):
                logits(model, attention_mask=torch.ones(shape, dtype=dtype))


@pytest.mark.filterwarnings("ignore")  # of tracing
def test_a_trace_keeps_looking_at_the_mask() -> None:
    model, _ = adapted()
    full, padded = torch.ones(2, 10, dtype=torch.long), torch.ones(2, 10, dtype=torch.long)
    padded[0, :4] = 0

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
            return self.model(tokens, attention_mask=mask, use_cache=False).logits

    with torch.no_grad():
        traced = torch.jit.trace(Logits(), (TOKENS[:, :10], full))
        for mask in (full, padded):
            got, expected = traced(TOKENS[:, :10], mask), logits(model, attention_mask=mask)
            torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=1e-5)


def test_models_that_share_a_configuration_do_not_share_adapters() -> None:
    config = CONFIGS["llama"]
    one, two = LlamaForCausalLM(config).eval(), LlamaForCausalLM(config).eval()
    assert one.config is two.config
    before = config._attn_implementation
    base = logits(two)
    for model in (one, two):
        adapter = lak.attach_adapter(model, lak.AdapterConfig())
        for layer in adapter.layers.values():
            nn.init.ones_(layer.gate)
    assert config._attn_implementation == before
    expected = logits(two)
    lak.detach_adapter(one)
    assert torch.equal(logits(two), expected)
    assert not torch.allclose(expected, base, atol=1e-3)
    lak.detach_adapter(two)
    assert torch.equal(logits(two), base)
    assert one.config._attn_implementation == two.config._attn_implementation == before


def test_another_attention_implementation_is_refused_with_a_word() -> None:
    model, _ = adapted()
    expected = logits(model)
    for part in (model, model.model):
        with pytest.raises(
            ValueError, match=r"set_attn_implementation: not while .*detach_adapter\(model\) comes first"
        ):
            part.set_attn_implementation("sdpa")
    assert torch.equal(logits(model), expected)
    model.config._attn_implementation = "sdpa"
    with pytest.raises(ValueError, match="expected 'zero_gate' as long as an adapter is attached, got 'sdpa'"):
        logits(model)
    lak.detach_adapter(model)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(logits(model), logits(build()), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["prefix_index", "gate", "adapter_names", "anything"])
def test_unknown_arguments_do_not_vanish(name: str) -> None:
    model, _ = adapted()
    with pytest.raises(TypeError, match=f"{name}: unexpected keyword argument"):
        model(TOKENS, **{name: torch.zeros(2)})


def test_what_looks_chosen_for_training_is_named_when_it_is_frozen() -> None:
    from peft import LoraConfig, get_peft_model

    lora = get_peft_model(build(), LoraConfig(target_modules=["q_proj"]))
    with pytest.warns(UserWarning, match=r"froze base_model.*lora_A.* and 3 more, .*trainable=\[\.\.\.\]"):
        lak.attach_adapter(lora, lak.AdapterConfig())
    assert not any("lora" in n and p.requires_grad for n, p in lora.named_parameters())
    lora = get_peft_model(build(), LoraConfig(target_modules=["q_proj"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lak.attach_adapter(lora, lak.AdapterConfig(), trainable=["*lora*"])
        assert all(p.requires_grad == ("lora" in n or "zero_gate" in n) for n, p in lora.named_parameters())
        lak.attach_adapter(build(), lak.AdapterConfig())  # a pre-trained head for tokens: nothing to say
    classifier = AutoModelForSequenceClassification.from_config(CONFIGS["llama"])
    with pytest.warns(UserWarning, match=r"froze score\.weight"):
        lak.attach_adapter(classifier, lak.AdapterConfig())
    lak.detach_adapter(classifier)
    assert all(p.requires_grad for p in classifier.parameters())
    lak.attach_adapter(classifier, lak.AdapterConfig(num_layers=1), trainable=["score"])
    assert sum(p.requires_grad for p in classifier.parameters()) == 3
    with pytest.raises(ValueError, match=r"trainable: expected names of .*, got 'scores'"):
        lak.attach_adapter(build(), lak.AdapterConfig(), trainable=["scores"])


def test_an_adapter_that_others_freeze_says_so_when_it_should_train() -> None:
    from peft import LoraConfig, get_peft_model

    model, _ = adapted()
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"])).train()
    with pytest.warns(UserWarning, match="adapter 'default': something froze its parameters"):
        wrapped(TOKENS)
    lak.set_adapter(wrapped, "default")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrapped(TOKENS).logits.sum().backward()
    assert all(p.grad is not None for n, p in wrapped.named_parameters() if "zero_gate" in n or "lora_B" in n)


def test_a_whole_model_saved_by_torch_works_in_another_process(tmp_path: Path) -> None:
    model, _ = adapted()
    torch.save((model, TOKENS, model(TOKENS).logits), tmp_path / "model.pt")
    code = (
        "import sys, torch, llama_adapter_kernels as lak\n"
        "model, tokens, expected = torch.load(sys.argv[1], weights_only=False)\n"
        "assert torch.equal(model(tokens).logits, expected)\n"
        "lak.detach_adapter(model); model(tokens)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "model.pt")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


class Quantised(nn.Module):
    """int8 weights with a scale, both buffers: no parameters, as GPTQ, AWQ and dynamic quantisation have it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax() / 127
        self.register_buffer("weight", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight.float() * self.scale).T


def test_projections_without_parameters() -> None:
    model = build()
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(layer.self_attn, name, Quantised(getattr(layer.self_attn, name)))
    base = logits(model)
    adapter = lak.attach_adapter(model, lak.AdapterConfig(prefix_length=3))
    torch.testing.assert_close(logits(model), base, atol=1e-5, rtol=1e-5)
    nn.init.ones_(adapter.layers["1"].gate)
    assert not torch.allclose(logits(model), base, atol=1e-3)


def test_offloaded_after_attaching_and_before(tmp_path: Path) -> None:
    from accelerate import cpu_offload

    model, adapter = adapted()
    expected = logits(model)
    cpu_offload(model, execution_device="cpu")
    assert adapter.layers["0"].prompt.is_meta
    assert torch.equal(logits(model), expected)
    adapter.save_pretrained(tmp_path)
    other = build()
    cpu_offload(other, execution_device="cpu")
    lak.load_adapter(other, tmp_path)
    assert torch.equal(logits(other), expected)


def test_tensor_parallel_models_are_refused_when_attaching() -> None:
    model = build()
    model._tp_size = 2
    with pytest.raises(ValueError, match="expected one without tensor parallelism"):
        lak.attach_adapter(model, lak.AdapterConfig())
    sliced = build()
    for layer in sliced.model.layers:
        layer.self_attn.k_proj = nn.Linear(48, 12)
    with pytest.raises(ValueError, match="layer 0's k_proj to give 2 heads of 12, got a width of 12"):
        lak.attach_adapter(sliced, lak.AdapterConfig())


SHARDED = """
import sys, torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
import llama_adapter_kernels as lak
from tests.support.small_models import TOKENS, adapted

rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
model, adapter = adapted()
expected = model(TOKENS).logits
for layer in model.model.layers:
    fully_shard(layer)
fully_shard(model)
assert type(adapter.layers["0"].prompt).__name__ == "DTensor"
torch.testing.assert_close(model(TOKENS).logits, expected, atol=1e-5, rtol=1e-5)
adapter.save_pretrained(f"{folder}/{rank}")
dist.barrier()
dist.destroy_process_group()
"""


def test_sharded_parameters_are_gathered_and_written_once(tmp_path: Path) -> None:
    processes = [
        subprocess.Popen([sys.executable, "-c", SHARDED, str(rank), str(tmp_path)], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    assert (tmp_path / "0").exists() and not (tmp_path / "1").exists()
    model, _ = adapted()
    other = build()
    lak.load_adapter(other, tmp_path / "0")
    assert torch.equal(logits(other), logits(model))


def test_a_failed_attach_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    from llama_adapter_kernels.integrations.transformers import methods

    model = build()
    before = {name: p.requires_grad for name, p in model.named_parameters()}, model.config._attn_implementation

    def fail(*_: object) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(methods, "exchange", fail)
    with pytest.raises(RuntimeError, match="no"):
        lak.attach_adapter(model, lak.AdapterConfig())
    monkeypatch.undo()
    after = {name: p.requires_grad for name, p in model.named_parameters()}, model.config._attn_implementation
    assert after == before
    assert not any("zero_gate" in name for name, _ in model.named_modules())
    assert not model.model._forward_pre_hooks and lak.attached_adapters(model) == {}


@pytest.mark.parametrize("wrong", [None, 3, "default", {"prefix_length": 10}])
def test_a_configuration_that_is_none(wrong: object) -> None:
    with pytest.raises(ValueError, match="config: expected an AdapterConfig, got"):
        lak.attach_adapter(build(), wrong)


@pytest.mark.parametrize("name", ["", "a.b", "a/b", "forward", "train", None, 3, "x" * 101])
def test_names_that_are_none(name: object) -> None:
    with pytest.raises(ValueError, match="name: expected letters, digits, _ and -"):
        lak.attach_adapter(build(), lak.AdapterConfig(), name)


@pytest.mark.parametrize(
    ("name", "expected", "values"),
    [
        (
            "prefix_length",
            "a whole number",
            (0, -1, 2.5, 10.0, "10", True, None, float("nan"), 1e30, 10**12, 10**5000, [1]),
        ),
        ("num_layers", "a whole number", (0, -3, "2", 2.0, False, float("nan"), [2])),
        ("layers", "", ("ab", 3, (), (0, 0), (-1,), (0.0,), ("0",), {"a": 1})),
        ("gate", "tanh or identity", ("relu", None, 1, ["tanh"])),
        ("gate_shape", "head or scalar", ("token", None, 1)),
    ],
)
def test_configurations_of_wrong_types_and_ranges(name: str, expected: str, values: tuple[object, ...]) -> None:
    for value in values:
        with pytest.raises(ValueError, match=f"{name}: expected {expected}") as raised:
            lak.AdapterConfig(**{name: value})
        assert len(str(raised.value)) < 200
