"""Several adapters on one model: a batch that mixes them equals its sequences one by one, whatever differs between them."""

import contextvars
import re
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

import llama_adapter_kernels as lak
from tests.support.several_adapters import KINDS, MIXED, ROWS, alone, served
from tests.support.small_models import build


@pytest.mark.parametrize("name", ["llama", "llama multi-head with biases", "qwen3", "mistral sliding window"])
def test_a_mixed_batch_equals_its_sequences_alone(name: str) -> None:
    model = served(name)
    with torch.no_grad():
        expected = torch.cat([alone(model, who)(row[None]).logits for who, row in zip(MIXED, ROWS, strict=True)])
        with lak.adapters_per_sequence(model, MIXED):
            got = model(ROWS).logits
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(model(ROWS[-1:]).logits, expected[-1:])  # outside of the block the active one counts
        with lak.adapters_per_sequence(model, [None] * 6):
            plain = model(ROWS).logits
    assert torch.equal(plain, alone(model, None)(ROWS).logits)


def test_gradients_of_a_mixed_batch_are_those_of_its_sequences() -> None:
    model = served()
    handles = lak.attached_adapters(model)

    def gradients(run: object) -> dict[str, list[Tensor]]:
        for handle in handles.values():
            handle.requires_grad_(True)
            handle.zero_grad()
        run()
        return {name: [p.grad.clone() for p in handle.parameters()] for name, handle in handles.items()}

    def one_by_one() -> None:
        for who, row in zip(MIXED, ROWS, strict=True):
            lak.set_adapter(model, who)
            for handle in handles.values():
                handle.requires_grad_(True)
            logits = model(row[None]).logits
            if who is not None:
                logits.square().sum().backward()

    def together() -> None:
        with lak.adapters_per_sequence(model, MIXED):
            model(ROWS).logits.square().sum().backward()

    expected, got = gradients(one_by_one), gradients(together)
    for name in handles:
        for a, b in zip(got[name], expected[name], strict=True):
            torch.testing.assert_close(a, b, atol=2e-4 * float(b.abs().max()), rtol=1e-3)


def test_one_trains_while_the_others_stay_frozen() -> None:
    model = served()
    lak.set_adapter(model, "b")
    with lak.adapters_per_sequence(model, MIXED):
        model(ROWS).logits.sum().backward()
    for name, handle in lak.attached_adapters(model).items():
        assert all((p.grad is not None) == p.requires_grad == (name == "b") for p in handle.parameters()), name
    lak.set_adapter(model, "c", trainable=False)
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_computes_again_what_it_computed(reentrant: bool) -> None:
    """Backward runs after the block has ended, and after another adapter was set."""
    model = served().train()
    lak.set_adapter(model, "a")

    def grads() -> list[Tensor]:
        with lak.adapters_per_sequence(model, MIXED):
            loss = model(ROWS, use_cache=False).logits.square().sum()
        lak.set_adapter(model, "a")
        loss.backward()
        found = [p.grad.clone() for p in lak.attached_adapters(model)["a"].parameters()]
        model.zero_grad()
        return found

    expected = grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    for a, b in zip(grads(), expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5 * float(b.abs().max()), rtol=1e-4)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_of_a_mixed_batch(cache: str, beams: int) -> None:
    model = served()
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "num_beams": beams, "disable_compile": True,
               "cache_implementation": cache}  # fmt: skip
    expected = [alone(model, who).generate(row[None], **options) for who, row in zip(MIXED, ROWS, strict=True)]
    with lak.adapters_per_sequence(model, MIXED):
        got = model.generate(ROWS, **options)
        assert model(ROWS).logits.shape[0] == len(MIXED)  # the beams are over
    assert torch.equal(got, torch.cat(expected))
    assert "generate" not in model.__dict__


def test_sampling_with_several_answers_per_sequence() -> None:
    model = served()
    options = {"max_new_tokens": 4, "do_sample": True, "num_return_sequences": 2, "eos_token_id": None}
    with lak.adapters_per_sequence(model, MIXED[:2]):
        torch.manual_seed(1)
        got = model.generate(ROWS[:2], **options)
    with lak.adapters_per_sequence(model, [who for who in MIXED[:2] for _ in range(2)]):
        torch.manual_seed(1)
        expected = model.generate(ROWS[:2].repeat_interleave(2, 0), **options | {"num_return_sequences": 1})
    assert torch.equal(got, expected)


def test_packed_sequences_have_adapters_each() -> None:
    model = served()
    lengths = [9, 4, 6, 3]
    rows = [row[:n] for row, n in zip(ROWS, lengths, strict=False)]
    offsets = torch.tensor([0, *lengths]).cumsum(0).int()
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    with torch.no_grad():
        expected = torch.cat([alone(model, who)(row[None]).logits[0] for who, row in zip(MIXED, rows, strict=False)])
        with lak.adapters_per_sequence(model, MIXED[:4]):
            by_offsets = model(
                torch.cat(rows)[None], position_ids=positions, cu_seq_lens_q=offsets, cu_seq_lens_k=offsets, max_length_q=9,
                max_length_k=9,
            ).logits[0]  # fmt: skip
            by_positions = model(torch.cat(rows)[None], position_ids=positions, use_cache=False).logits[0]
    for got in (by_offsets, by_positions):
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("frozen", [False, True])
def test_conditions_are_added_to_the_prompts_of_their_sequence(frozen: bool) -> None:
    model = served(kinds={"a": {"prefix_length": 4}, "c": KINDS["c"]})
    handles = lak.attached_adapters(model)
    conditions = [torch.randn(3, 48), None, torch.randn(3, 4, 48), None, torch.randn(3, 4, 48)]
    names = ["c", "c", "a", "a", "a"]
    with torch.no_grad():
        expected = []
        for who, condition, row in zip(names, conditions, ROWS, strict=False):
            lak.set_adapter(model, who)
            layers = list(handles[who].layers.values())
            added = [torch.zeros(())] * len(layers) if condition is None else (
                condition.unbind() if condition.dim() == 3 else [condition] * len(layers)
            )  # fmt: skip
            for layer, one in zip(layers, added, strict=True):
                layer.prompt += one
            expected.append(model(row[None]).logits)
            for layer, one in zip(layers, added, strict=True):
                layer.prompt -= one
        if frozen:
            handles["a"].freeze_prefix()
        for _ in range(2):
            with lak.adapters_per_sequence(model, names, conditions=conditions):
                got = model(ROWS[:5]).logits
            torch.testing.assert_close(got, torch.cat(expected), atol=2e-5, rtol=1e-4)
    condition = torch.randn(3, 4, 48, requires_grad=True)
    with lak.adapters_per_sequence(model, ["a"], conditions=[condition]):
        model(ROWS[:1]).logits.sum().backward()
    assert condition.grad.flatten(1).any(1).all()


def test_load_and_detach_while_other_threads_run(tmp_path: Path) -> None:
    model = served()
    lak.attached_adapters(model)["c"].save_pretrained(tmp_path)
    with torch.no_grad(), lak.adapters_per_sequence(model, MIXED):
        expected = model.generate(ROWS, max_new_tokens=4, do_sample=False, eos_token_id=None)
    wrong: list[object] = []

    def serve(names: list[str | None], wanted: Tensor) -> None:
        try:
            for _ in range(6):
                with lak.adapters_per_sequence(model, names):
                    got = model.generate(ROWS, max_new_tokens=4, do_sample=False, eos_token_id=None)
                if not torch.equal(got, wanted):
                    wrong.append(names)
        except Exception as error:
            wrong.append(error)

    lak.set_adapter(model, None)
    base = model.generate(ROWS, max_new_tokens=4, do_sample=False, eos_token_id=None)
    threads = [threading.Thread(target=serve, args=pair) for pair in ((MIXED, expected), ([None] * 6, base))]
    for thread in threads:
        thread.start()
    for i in range(8):
        lak.load_adapter(model, tmp_path, f"new{i}")
        lak.detach_adapter(model, f"new{i}")
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_forward_pass_ends_with_the_adapter_it_began_with() -> None:
    model = served()
    lak.set_adapter(model, "a")
    expected = model(ROWS).logits

    def detach(*_: object) -> None:
        if "a" in lak.attached_adapters(model):
            lak.set_adapter(model, "b")
            lak.detach_adapter(model, "a")

    handle = model.model.layers[0].mlp.register_forward_hook(detach)
    assert torch.equal(model(ROWS).logits, expected)
    handle.remove()
    assert not torch.equal(model(ROWS).logits, expected)


def test_a_block_belongs_to_its_thread() -> None:
    model = alone(served(), "d")
    found: dict[str, Tensor] = {}

    def run(name: str) -> None:
        with torch.no_grad():
            found[name] = model(ROWS[:1]).logits

    run("active")
    with lak.adapters_per_sequence(model, ["a"]):
        run("inside")
        inherited = contextvars.copy_context()
        for name, target in (("plain thread", run), ("copied context", lambda name: inherited.run(run, name))):
            thread = threading.Thread(target=target, args=(name,))
            thread.start()
            thread.join()
    assert torch.equal(found["plain thread"], found["active"])
    assert torch.equal(found["copied context"], found["inside"])
    assert not torch.equal(found["inside"], found["active"])


def test_bad_input() -> None:
    model = served()
    for call in (
        lambda: lak.set_adapter(model, "french"),
        lambda: lak.detach_adapter(model, "french"),
        lambda: lak.adapters_per_sequence(model, ["a", "french"]).__enter__(),
    ):
        with pytest.raises(ValueError, match="adapter 'french': unknown; this model has 'a', 'b', 'c', 'd'"):
            call()
    for name in (3, ["a"]):
        with pytest.raises(ValueError, match=re.escape(f"adapter {name}: unknown; this model has 'a',")):
            lak.set_adapter(model, name)
    with pytest.raises(ValueError, match="adapter 'a': expected a name that is not taken"):
        lak.attach_adapter(model, lak.AdapterConfig(), "a")
    with pytest.raises(
        ValueError, match=r"expected the name of one of several adapters \('a', 'b', 'c', 'd'\), got none"
    ):
        lak.detach_adapter(model)
    with pytest.raises(ValueError, match=r"adapter 'a': active while others remain; set_adapter"):
        lak.detach_adapter(model, "a")
    with lak.adapters_per_sequence(model, ["a", "b"]):
        for rows in (1, 3, 4):
            with pytest.raises(ValueError, match=f"one adapter for each of the {rows} sequences of the batch, got 2"):
                model(ROWS[:rows])
        with pytest.raises(ValueError, match="adapter 'b': in use by an adapters_per_sequence block"):
            lak.detach_adapter(model, "b")
    for names in ("ab", 3, None):
        with pytest.raises(ValueError, match="names: expected a list"):
            lak.adapters_per_sequence(model, names).__enter__()
    for conditions, message in (
        ([torch.zeros(4, 48)], "conditions: expected one for each of 2 names, got 1"),
        ([torch.zeros(4, 47), None], r"conditions: expected \[4, 48\] or \[3, 4, 48\] for adapter 'a', got \[4, 47\]"),
        ([None, torch.zeros(4, 48)], "conditions: expected None for sequence 1, which has no adapter"),
    ):
        with pytest.raises(ValueError, match=message):
            lak.adapters_per_sequence(model, ["a", None], conditions=conditions).__enter__()
    lak.detach_adapter(model, "b")
    assert list(lak.attached_adapters(model)) == ["a", "c", "d"]
    assert not any("zero_gate.b" in name for name, _ in model.named_parameters())


def test_an_adapter_of_another_base_leaves_the_others_alone(tmp_path: Path) -> None:
    other = build("qwen3")
    lak.attach_adapter(other, lak.AdapterConfig()).save_pretrained(tmp_path)
    model = served()
    with pytest.raises(ValueError, match="made for a model with model_type qwen3"):
        lak.load_adapter(model, tmp_path, "e")
    assert list(lak.attached_adapters(model)) == ["a", "b", "c", "d"]
