"""The loss: what cross_entropy of all logits gives, in the memory of one chunk of them; lower layers save nothing."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import llama_adapter_kernels as lak
from llama_adapter_kernels.training import loss
from llama_adapter_kernels.training.loss import head_loss, response_loss, separate_head
from llama_adapter_kernels.training.packing import pack
from llama_adapter_kernels.training.tokens import Example
from tests.support.small_models import adapted, build


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK_BYTES", {"cpu": 7 * 96 * 4, "cuda": 7 * 96 * 4})


def inputs(dtype: torch.dtype, bias: bool, tokens: int = 23) -> tuple[nn.Linear, torch.Tensor, torch.Tensor]:
    head = nn.Linear(16, 96, bias=bias, dtype=dtype).requires_grad_(False)
    return head, torch.randn(tokens, 16, dtype=dtype, requires_grad=True), torch.randint(96, (tokens,))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("frozen", [True, False])
def test_value_and_gradients_in_float64(bias: bool, frozen: bool) -> None:
    head, hidden, targets = inputs(torch.float64, bias)
    head.requires_grad_(not frozen)
    wanted = [hidden, *(parameter for parameter in head.parameters() if not frozen)]
    expected = cross_entropy(head(hidden), targets, reduction="sum")
    found = head_loss(head, hidden, targets)
    torch.testing.assert_close(found, expected)
    for mine, theirs in zip(
        torch.autograd.grad(0.37 * found, wanted), torch.autograd.grad(0.37 * expected, wanted), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_less_exact_than_eager_in_the_same_dtype(dtype: torch.dtype) -> None:
    head, hidden, targets = inputs(dtype, False, tokens=400)
    scale = 1 / 397  # not a power of two: rounded to bfloat16 it would be off by a fraction of a percent, everywhere

    def run(module: nn.Linear, x: torch.Tensor, chunked: bool) -> tuple[torch.Tensor, torch.Tensor]:
        x = x.detach().requires_grad_()
        logits = None if chunked else module(x)
        value = head_loss(module, x, targets) if logits is None else cross_entropy(
            logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, reduction="sum"
        )  # fmt: skip
        (scale * value).backward()
        return value.detach().double(), x.grad.double()

    truth_head = nn.Linear(16, 96, bias=False, dtype=torch.float64).requires_grad_(False)
    truth_head.weight.copy_(head.weight)
    truth, eager, mine = run(truth_head, hidden.double(), False), run(head, hidden, False), run(head, hidden, True)
    for right, base, found in zip(truth, eager, mine, strict=True):
        allowed = 2 * (base - right).abs().max() + 2 * torch.finfo(dtype).eps * right.abs().max()
        assert (found - right).abs().max() <= allowed
    # No bias of the whole gradient either.
    assert (mine[1] / truth[1]).nanmedian() == pytest.approx(1, abs=torch.finfo(dtype).eps)


def test_large_logits_and_no_tokens() -> None:
    head, hidden, targets = inputs(torch.float32, False)
    found = head_loss(head, 3000 * hidden, targets)
    torch.testing.assert_close(found, cross_entropy(head(3000 * hidden), targets, reduction="sum"))
    for frozen in (True, False):
        head.requires_grad_(not frozen)
        empty = head_loss(head, hidden[:0], targets[:0])
        assert empty.item() == 0
        [gradient] = torch.autograd.grad(empty, hidden, allow_unused=True)
        assert gradient is None or not gradient.any()


def test_it_is_differentiated_once() -> None:
    found = head_loss(*inputs(torch.float32, False))
    found.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        found.backward()


def batch() -> dict[str, object]:
    return pack([Example(tuple(range(3, 3 + n)), n // 2) for n in (9, 14, 5)])


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_a_models_loss_and_gradients_are_those_of_all_its_logits(name: str) -> None:
    model, adapter = adapted(name)
    parameters = list(adapter.parameters())
    packed = batch()
    found, count = response_loss(model, packed)
    assert separate_head(model) is not None
    labels = packed["labels"]
    logits = model(**{key: value for key, value in packed.items() if key != "labels"}, use_cache=False).logits
    expected = cross_entropy(logits[0, :-1], labels[0, 1:], reduction="sum")
    assert count == int((labels >= 0).sum())
    torch.testing.assert_close(found, expected)
    for mine, theirs in zip(
        torch.autograd.grad(found, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("capped", [False, True])
def test_a_model_that_changes_its_logits_afterwards(monkeypatch: pytest.MonkeyPatch, capped: bool) -> None:
    """A factor commutes with the head; a soft cap does not, and such a model computes its logits by itself."""
    model, _ = adapted("llama")
    forward = model.forward

    def changed(**options: object) -> object:
        output = forward(**options)
        output.logits = torch.tanh(output.logits) if capped else output.logits / 3
        return output

    monkeypatch.setattr(model, "forward", changed)
    packed = batch()
    found, _ = response_loss(model, packed)
    assert (separate_head(model) is None) == capped
    logits = model(**{key: value for key, value in packed.items() if key != "labels"}, use_cache=False).logits
    torch.testing.assert_close(found, cross_entropy(logits[0, :-1], packed["labels"][0, 1:], reduction="sum"))


def test_the_head_is_itself_again_after_an_error() -> None:
    model, _ = adapted("llama")
    separate_head(model)
    with pytest.raises((TypeError, ValueError)):
        response_loss(model, {**batch(), "nonsense": 1})
    assert "forward" not in model.lm_head.__dict__


def test_layers_below_the_lowest_adapted_one_save_nothing() -> None:
    """No gradient goes through them, so autograd must keep none of their activations."""
    model = build("llama")
    adapter = lak.attach_adapter(model, lak.AdapterConfig(prefix_length=4, num_layers=1))
    with torch.no_grad():
        adapter.layers["2"].gate.fill_(0.7)
    running: list[str] = []
    saved: dict[str, int] = {}
    for number, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(lambda *_, name=str(number): running.append(name))
        layer.register_forward_hook(lambda *_: running.pop() and None)

    def pack_tensor(tensor: torch.Tensor) -> torch.Tensor:
        place = running[-1] if running else "outside"
        saved[place] = saved.get(place, 0) + tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack_tensor, lambda tensor: tensor):
        total, _ = response_loss(model, batch())
    assert saved.keys() == {"2", "outside"}
    total.backward()
    assert all(parameter.grad is not None for parameter in adapter.parameters())


def test_memory_is_that_of_the_weight_and_one_chunk() -> None:
    """A vocabulary of 128k in bfloat16; all logits of 1,000 tokens would take as much again several times.

    With 8,192 tokens, which take longer, the script says 1.16.
    """
    script = Path(__file__).parents[2] / "benchmarks" / "head_memory.py"
    result = subprocess.run([sys.executable, script, "--tokens", "1000"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "ratio" in result.stdout
