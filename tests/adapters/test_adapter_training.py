"""Training an adapter: gradients are the same however the sequences are laid out and whatever transformers does."""

import pytest
import torch
from torch import Tensor, nn

import llama_adapter_kernels as lak
from llama_adapter_kernels.integrations.transformers import attention as transformers_attention
from tests.support.small_models import TOKENS, adapted, build

ROWS = [TOKENS[0, :13], TOKENS[0, 4:9], TOKENS[0, 2:4]]


def gradients(adapter: lak.ZeroGateAdapter) -> list[Tensor]:
    grads = [parameter.grad.clone() for parameter in adapter.parameters()]
    adapter.zero_grad()
    assert all((grad != 0).any() for grad in grads)
    return grads


def loss(logits: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=-100, reduction="sum")


def one_by_one(model: nn.Module, adapter: lak.ZeroGateAdapter) -> list[Tensor]:
    for row in ROWS:
        loss(model(row[None], use_cache=False).logits[0, :-1], row[1:]).backward()
    return gradients(adapter)


def assert_same(got: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "mistral sliding window", "qwen3"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_padded_batches(name: str, side: str) -> None:
    model, adapter = adapted(name)
    expected = one_by_one(model, adapter)
    batch = torch.zeros(3, 13, dtype=torch.long)
    targets = torch.full((3, 13), -100)
    for i, row in enumerate(ROWS):
        at = 0 if side == "right" else 13 - len(row)
        batch[i, at : at + len(row)] = row
        targets[i, at : at + len(row) - 1] = row[1:]
    mask = (batch != 0).long()
    logits = model(batch, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    loss(logits, targets).backward()
    assert_same(gradients(adapter), expected)


def packed(rows: list[Tensor], offsets: bool) -> tuple[dict[str, object], Tensor]:
    batch: dict[str, object] = {
        "input_ids": torch.cat(rows)[None], "position_ids": torch.cat([torch.arange(len(row)) for row in rows])[None],
    }  # fmt: skip
    if offsets:
        ends = torch.tensor([0, *map(len, rows)]).cumsum(0).int()
        longest = max(map(len, rows))
        batch |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}
    return batch, torch.cat([torch.cat([row[1:], torch.tensor([-100])]) for row in rows])[None]


@pytest.mark.parametrize("name", ["llama", "mistral sliding window", "qwen2"])
@pytest.mark.parametrize("offsets", [True, False], ids=["cu_seq_lens", "position_ids"])
def test_packed_sequences(name: str, offsets: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, adapter = adapted(name)
    expected = one_by_one(model, adapter)
    calls = []
    original = transformers_attention.zero_gate_attention_varlen
    monkeypatch.setattr(
        transformers_attention, "zero_gate_attention_varlen", lambda *a, **k: calls.append(1) or original(*a, **k)
    )
    batch, targets = packed(ROWS, offsets)
    if name == "mistral sliding window" and offsets:
        with pytest.raises(ValueError, match="max_length_k: expected at most sliding_window 5, got 13"):
            model(**batch, use_cache=False)
        return
    loss(model(**batch, use_cache=False).logits, targets).backward()
    assert_same(gradients(adapter), expected)
    assert len(calls) == (0 if name == "mistral sliding window" else 3)  # longer than the window: by a mask


def test_packed_rows_of_a_batch() -> None:
    model, adapter = adapted()
    rows = [[TOKENS[0, :7], TOKENS[0, 3:5]], [TOKENS[0, 1:4], TOKENS[0, 2:8]]]
    for row in [*rows[0], *rows[1]]:
        loss(model(row[None], use_cache=False).logits[0, :-1], row[1:]).backward()
    expected = gradients(adapter)
    batches = [packed(row, False) for row in rows]
    ids, positions = (torch.cat([b[0][name] for b in batches]) for name in ("input_ids", "position_ids"))
    loss(model(ids, position_ids=positions, use_cache=False).logits, torch.cat([b[1] for b in batches])).backward()
    assert_same(gradients(adapter), expected)


def test_offsets_and_a_mask_that_hides_are_too_much() -> None:
    model, _ = adapted()
    batch, _ = packed(ROWS, True)
    mask = torch.ones_like(batch["input_ids"])
    mask[0, 3] = 0
    with pytest.raises(ValueError, match="cu_seq_lens_q: expected no attention_mask"):
        model(**batch, attention_mask=mask, use_cache=False)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant: bool) -> None:
    """Reentrant checkpointing runs its first pass without gradients: a prefix kept there must not be used later."""
    model, adapter = adapted()
    model.train()
    loss(model(TOKENS, use_cache=False).logits, TOKENS).backward()
    expected = gradients(adapter)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()  # as PEFT does: nothing else below the first layer requires a gradient
    loss(model(TOKENS, use_cache=False).logits, TOKENS).backward()
    assert_same(gradients(adapter), expected)


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_compiled_training_has_no_graph_break(layout: str) -> None:
    model, adapter = adapted()
    batch, targets = packed(ROWS, True) if layout == "packed" else ({"input_ids": TOKENS}, TOKENS)
    loss(model(**batch, use_cache=False).logits, targets).backward()
    expected = gradients(adapter)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss(compiled(**batch, use_cache=False).logits, targets).backward()
    assert_same(gradients(adapter), expected)


def test_compiled_by_inductor() -> None:
    model, adapter = adapted(num_layers=1)
    loss(model(TOKENS, use_cache=False).logits, TOKENS).backward()
    expected = gradients(adapter)
    loss(torch.compile(model, fullgraph=True)(TOKENS, use_cache=False).logits, TOKENS).backward()
    assert_same(gradients(adapter), expected)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_autocast(name: str) -> None:
    """Gradients of float32 parameters through a model that computes in bfloat16; an evaluation in between keeps apart."""
    model, adapter = adapted(name)
    loss(model(TOKENS, use_cache=False).logits, TOKENS).backward()
    expected = gradients(adapter)
    with torch.no_grad():
        exact = model(TOKENS).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.no_grad():
            low = model(TOKENS).logits
        loss(model(TOKENS, use_cache=False).logits, TOKENS).backward()
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, exact)
    assert 0 < (low.float() - exact).abs().max() < 0.2
    for got, wanted in zip(gradients(adapter), expected, strict=True):
        assert got.dtype == torch.float32
        assert (got - wanted).norm() < 0.1 * wanted.norm()


def trained(dtype: torch.dtype) -> list[float]:
    model = build(dtype=dtype)
    torch.manual_seed(1)
    adapter = lak.attach_adapter(model, lak.AdapterConfig(prefix_length=4))
    optimizer = torch.optim.AdamW(adapter.parameters(), 0.3)
    losses = []
    for _ in range(6):
        value = loss(model(TOKENS, use_cache=False).logits[:, :-1].float(), TOKENS[:, 1:])
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.item())
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in adapter.parameters())
    return losses


def test_low_precision_models_train_as_the_float32_model() -> None:
    expected = trained(torch.float32)
    assert expected[-1] < expected[0] - 3
    for dtype in (torch.bfloat16, torch.float16):
        assert trained(dtype) == pytest.approx(expected, abs=0.1)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
@pytest.mark.parametrize("config", [{}, {"gate": "identity", "gate_shape": "scalar", "layers": (0, 2)}], ids=str)
def test_gradients_are_those_of_the_formula(name: str, config: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts and gates through projections, norms and the whole model, against autograd through plain matrix products."""
    model, adapter = adapted(name, **config)
    loss(model(TOKENS, use_cache=False).logits, TOKENS).backward()
    got = gradients(adapter)

    def formula(query: Tensor, key: Tensor, value: Tensor, prefix_key: Tensor | None, prefix_value: Tensor | None,
                gate: Tensor | None, *, scale: float, **masks: object) -> Tensor:  # fmt: skip
        group = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        hidden = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).triu(1)
        words = (query @ key.mT * scale).masked_fill(hidden, -torch.inf).softmax(-1) @ value
        if gate is None:
            return words
        prefix_key, prefix_value = (x.repeat_interleave(group, 1) for x in (prefix_key, prefix_value))
        return words + gate.view(-1, 1, 1) * ((query @ prefix_key.mT * scale).softmax(-1) @ prefix_value)

    monkeypatch.setattr(transformers_attention, "zero_gate_attention", formula)
    loss(model(TOKENS, use_cache=False).logits, TOKENS).backward()
    assert_same(got, gradients(adapter))
