"""Options that change how a step is computed, not what it learns: compiled, recomputed, in a lower precision."""

import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import llama_adapter_kernels as lak
from llama_adapter_kernels.errors import UserError
from llama_adapter_kernels.testing.kept import kept_by_autograd
from llama_adapter_kernels.training import finetune as fine_tuning
from llama_adapter_kernels.training import loop
from llama_adapter_kernels.training.loop import Outcome
from llama_adapter_kernels.training.loss import head_loss, response_loss
from llama_adapter_kernels.training.memory import layers_with_gradients, recompute
from llama_adapter_kernels.training.packing import pack
from llama_adapter_kernels.training.tokens import Example
from tests.support.runs import QUIET, SHORT, run, weights
from tests.support.small_models import build

EVALUATED = replace(SHORT, eval_fraction=0.2)


@pytest.fixture(scope="module")
def plain(tiny_model: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, Path]:
    output = tmp_path_factory.mktemp("plain") / "run"
    return run(tiny_model, rows_file, output, EVALUATED), output


def test_a_compiled_model_gives_the_same_losses(
    tiny_model: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six graphs, whatever the numbers of layers, tokens and sequences: of the lowest adapted layer, whose input needs no
    gradient, of those above it, and of all for the held-out loss, each for batches of one sequence and of several."""
    settings = replace(EVALUATED, layers=3)
    expected = run(tiny_model, rows_file, tmp_path / "plain", settings)
    monkeypatch.setattr(loop, "COMPILE_BACKEND", "eager")  # torch's graphs; making machine code of them takes minutes
    torch._dynamo.reset()
    counters.clear()
    execution = replace(QUIET, compile=True)
    outcome = run(tiny_model, rows_file, tmp_path / "run", settings, execution=execution)
    assert outcome.losses == pytest.approx(expected.losses, rel=1e-5)
    assert outcome.held_out_losses == pytest.approx(expected.held_out_losses, rel=1e-5)
    for name, tensor in weights(tmp_path / "plain").items():
        torch.testing.assert_close(weights(tmp_path / "run")[name], tensor, rtol=1e-4, atol=1e-4)
    assert counters["stats"]["unique_graphs"] == 6
    assert not counters["graph_break"]


def test_compiled_and_in_pieces_is_refused(tiny_model: Path, rows_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--compile, --shard: expected one of them, got both"):
        run(tiny_model, rows_file, tmp_path / "run", execution=replace(QUIET, compile=True, shard=True))


@pytest.mark.parametrize("how", [{"memory": "low"}, {"gradient_checkpointing": True}])
def test_activations_computed_again_are_the_same(
    plain: tuple[Outcome, Path], tiny_model: Path, rows_file: Path, tmp_path: Path, how: dict[str, object]
) -> None:
    outcome = run(tiny_model, rows_file, tmp_path / "run", EVALUATED, execution=replace(QUIET, **how))
    expected, output = plain
    assert outcome.losses == pytest.approx(expected.losses, rel=1e-6)
    for name, tensor in weights(output).items():
        torch.testing.assert_close(weights(tmp_path / "run")[name], tensor, rtol=1e-5, atol=1e-6)


def saved_bytes(model: nn.Module, batch: dict[str, object]) -> int:
    return kept_by_autograd(model, lambda: response_loss(model, batch))


def test_low_memory_keeps_little_and_nothing_below_the_lowest_adapted_layer() -> None:
    """Each adapted layer keeps its input, the frozen layers below it nothing at all."""
    model = build("llama")
    adapter = lak.attach_adapter(model, lak.AdapterConfig(prefix_length=4, num_layers=2))
    with torch.no_grad():
        for layer in adapter.layers.values():
            layer.gate.fill_(0.7)
    batch = pack([Example(tuple(3 + i % 90 for i in range(64)), 32)] * 8)
    much = saved_bytes(model, batch)
    model.train()
    recompute(model)
    assert saved_bytes(model, batch) < 0.6 * much
    running: list[int] = []
    saved: dict[int, list[weakref.ref[torch.Tensor]]] = {}
    for number, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(lambda *_, n=number: running.append(n))
        layer.register_forward_hook(lambda *_: (running.pop(), None)[1])

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if running:
            tensor = tensor.detach()  # an object that nothing else holds
            saved.setdefault(running[-1], []).append(weakref.ref(tensor))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        total, _ = response_loss(model, batch)
    alive = {number: sum(one() is not None for one in refs) for number, refs in saved.items()}
    assert alive == {1: 1, 2: 1}
    total.backward()


def test_what_is_tuned_in_lower_layers_counts() -> None:
    model = build("llama")
    lak.attach_adapter(model, lak.AdapterConfig(num_layers=1))
    assert list(layers_with_gradients(model)) == list(model.model.layers[2:])
    lak.detach_adapter(model)
    lak.attach_adapter(model, lak.AdapterConfig(num_layers=1, tuning=lak.Tuning()))
    assert len(layers_with_gradients(model)) == len(model.model.layers)


def test_autocast_keeps_float32_weights_and_learns_the_same(
    plain: tuple[Outcome, Path], tiny_model: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within what bfloat16 products lose; the gradient norms say that the products were in bfloat16."""
    load, loaded = fine_tuning.load_model, []

    def note(name: str, dtype: torch.dtype) -> nn.Module:
        loaded.append(dtype)
        return load(name, dtype)

    monkeypatch.setattr(fine_tuning, "load_model", note)
    settings = replace(EVALUATED, autocast=True)
    outcome = run(tiny_model, rows_file, tmp_path / "run", settings)
    expected, _ = plain
    assert loaded == [torch.float32]
    assert outcome.losses == pytest.approx(expected.losses, rel=2e-2)
    assert outcome.losses != pytest.approx(expected.losses, rel=1e-6)
    assert outcome.held_out_losses == pytest.approx(expected.held_out_losses, rel=2e-2)
    assert all(tensor.dtype == torch.float32 for tensor in weights(tmp_path / "run").values())
    with pytest.raises(UserError, match="--autocast: keeps the weights float32, expected no --dtype beside it, got bf"):
        run(tiny_model, rows_file, tmp_path / "other", replace(settings, dtype="bfloat16"))


def test_bfloat16_weights(plain: tuple[Outcome, Path], tiny_model: Path, rows_file: Path, tmp_path: Path) -> None:
    outcome = run(tiny_model, rows_file, tmp_path / "run", replace(EVALUATED, dtype="bfloat16"))
    assert outcome.losses == pytest.approx(plain[0].losses, rel=2e-2)
    assert all(tensor.dtype == torch.float32 for tensor in weights(tmp_path / "run").values())


def test_the_head_within_autocast_is_as_exact_as_a_linear_layer_there() -> None:
    torch.manual_seed(0)
    head = nn.Linear(16, 96, bias=True).requires_grad_(False)
    hidden, targets = torch.randn(50, 16, requires_grad=True), torch.randint(96, (50,))

    def eager(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(
            module(x).to(torch.promote_types(x.dtype, torch.float32)), targets, reduction="sum"
        )

    with torch.autocast("cpu", torch.bfloat16):
        found = head_loss(head, hidden, targets)
        base = eager(head, hidden)
    truth_head, exact = nn.Linear(16, 96, dtype=torch.float64), hidden.detach().double().requires_grad_()
    truth_head.load_state_dict(head.state_dict())
    truth = eager(truth_head, exact)
    values = [torch.stack([value.double()]) for value in (found, base, truth)]
    gradients = [
        torch.autograd.grad(value, x)[0].double() for value, x in ((found, hidden), (base, hidden), (truth, exact))
    ]
    for mine, theirs, right in (values, gradients):
        allowed = 2 * (theirs - right).abs().max() + 2 * torch.finfo(torch.bfloat16).eps * right.abs().max()
        assert (mine - right).abs().max() <= allowed
    assert not torch.equal(found.detach().double(), truth.detach())
