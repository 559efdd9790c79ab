"""An adapted model on a real device: what users run, on every backend, against the same model in float64 on the CPU."""

import copy

import pytest
import torch

import llama_adapter_kernels as lak

pytestmark = pytest.mark.gpu
BACKENDS = ("cuda", "triton", "reference")


def adapted(device: str, dtype: torch.dtype) -> tuple[torch.nn.Module, torch.nn.Module]:
    """(the model on the device, the same one in float64 on the CPU), gates open."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=256, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, attn_implementation="sdpa", initializer_range=0.1,
    )  # fmt: skip
    exact = LlamaForCausalLM(config).eval()
    adapter = lak.attach_adapter(exact, lak.AdapterConfig(prefix_length=10))
    with torch.no_grad():
        for layer in adapter.layers.values():
            layer.gate.uniform_(0.5, 1.5)
    model = copy.deepcopy(exact).to(device, dtype)
    return model, exact.double()


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.detach().cpu().double() - expected.detach()).norm() / expected.detach().norm()).item()


def trainable(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)], ids=str)
def test_logits_and_gradients(backend: str, dtype: torch.dtype, bound: float) -> None:
    model, exact = adapted("cuda", dtype)
    ids = torch.randint(0, 256, (2, 77))
    expected = exact(input_ids=ids, labels=ids)
    expected.loss.backward()
    with lak.use_backend(backend):
        found = model(input_ids=ids.cuda(), labels=ids.cuda())
        found.loss.backward()
    assert relative(found.logits, expected.logits) < bound
    for name, parameter in trainable(exact).items():
        assert parameter.grad is not None
        gradient = trainable(model)[name].grad
        assert gradient is not None and relative(gradient, parameter.grad) < 2 * bound, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_batches(backend: str) -> None:
    from transformers import DataCollatorWithFlattening

    model, exact = adapted("cuda", torch.float32)
    rows = [{"input_ids": torch.randint(0, 256, (length,)).tolist()} for length in (5, 70, 1, 130)]
    batch = DataCollatorWithFlattening(return_flash_attn_kwargs=True)(rows)
    on_device = {name: v.cuda() if isinstance(v, torch.Tensor) else v for name, v in batch.items()}
    exact(**batch, use_cache=False).loss.backward()
    with lak.use_backend(backend):
        model(**on_device, use_cache=False).loss.backward()
    for name, parameter in trainable(exact).items():
        assert relative(trainable(model)[name].grad, parameter.grad) < 1e-3, name  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation(backend: str, cache: str) -> None:
    model, exact = adapted("cuda", torch.float32)
    ids = torch.randint(3, 256, (2, 19))
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = exact.generate(input_ids=ids, attention_mask=mask, **options)
    with lak.use_backend(backend):
        found = model.generate(input_ids=ids.cuda(), attention_mask=mask.cuda(), cache_implementation=cache, **options)
    assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_compiled(backend: str) -> None:
    model, exact = adapted("cuda", torch.float32)
    ids = torch.randint(0, 256, (2, 40))
    expected = exact(input_ids=ids).logits
    with lak.use_backend(backend):
        compiled = torch.compile(model, fullgraph=True)
        output = compiled(input_ids=ids.cuda(), use_cache=False).logits
        assert relative(output, expected) < 1e-4
        output.sum().backward()
    assert all(p.grad is not None for p in trainable(model).values())
