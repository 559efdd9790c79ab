"""Every architecture of docs/models.md, against an eager computation that shares nothing with the package.

The expected results come from the plain model. Prefix keys and values: the attention module itself, run on the prompt with a
rotation by nothing, tells what key and value it hands to attention. Attention: two softmaxes, written out.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

import llama_adapter_kernels as lak
from llama_adapter_kernels.integrations.target import find_target
from tests.support.architectures import EXAMPLES, answer, build, inputs

PREFIX = 3
Attend = Callable[[nn.Module, Tensor, Tensor, Tensor, Tensor | None, float, bool], Tensor]


@contextmanager
def attending(part: nn.Module, modules: tuple[Any, ...], attend: Attend) -> Iterator[None]:
    """The plain model computes the attention of `modules` by `attend`, other attention as always."""

    def hook(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None = None,
             is_causal: bool | None = None, **_: object) -> tuple[Tensor, None]:  # fmt: skip
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        run = attend if any(module is other for other in modules) else plain
        return run(module, query, key, value, mask, scaling, causal).transpose(1, 2), None

    AttentionInterface.register("expected", hook)
    AttentionMaskInterface.register("expected", sdpa_mask)
    before = part.config._attn_implementation
    configs = {id(m.config): m.config for m in modules}
    for config in configs.values():
        config._attn_implementation = "expected"
    current: list[nn.Module] = []
    hooks = [m.register_forward_pre_hook(lambda module, _: current.append(module)) for m in modules]
    original = nn.functional.scaled_dot_product_attention

    def falcon(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool, **_: object
    ) -> Tensor:
        return attend(current[-1], query, key, value, attn_mask, query.shape[-1] ** -0.5, is_causal)

    try:
        if "Falcon" in type(modules[0]).__name__:
            for config in configs.values():
                config._attn_implementation = "sdpa"
            nn.functional.scaled_dot_product_attention = falcon
        yield
    finally:
        nn.functional.scaled_dot_product_attention = original
        for config in configs.values():
            config._attn_implementation = before
        for handle in hooks:
            handle.remove()


def plain(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, causal: bool
          ) -> Tensor:  # fmt: skip
    """softmax(scale Q K^T) V with everything written out."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = query @ key.mT * scaling
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    elif causal and query.shape[2] > 1:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    return scores.softmax(-1).nan_to_num() @ value


class Expected:
    """The plain model with an adapter's prompts and gates, written out."""

    def __init__(self, name: str, adapter: lak.ZeroGateAdapter) -> None:
        self.name = name
        self.model, self.part = build(name)
        self.model.requires_grad_(False)
        target = find_target(self.part)
        self.modules = target.attentions
        self.prompts = {int(n): layer.prompt.detach().clone().requires_grad_() for n, layer in adapter.layers.items()}
        self.gates = {int(n): layer.gate.detach().clone().requires_grad_() for n, layer in adapter.layers.items()}

    def prefixes(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Key and value [1, H, P, D] of every adapted layer: what the module hands to attention for its prompt."""
        found: dict[int, tuple[Tensor, Tensor]] = {}

        def record(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: object) -> Tensor:
            number = next(i for i, other in enumerate(self.modules) if other is module)
            found[number] = key, value
            return torch.zeros_like(query)

        def swap(number: int) -> Callable[..., Any]:
            def pre(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
                prompt = self.prompts[number][None]
                args = (prompt, *args[1:]) if args else args
                kwargs = {key: value for key, value in kwargs.items() if "past" not in key} | {"attention_mask": None}
                if not args:
                    kwargs["hidden_states"] = prompt
                if len(args) > 1:
                    args = args[:1]
                rotary = kwargs.get("position_embeddings")
                if rotary is not None:
                    still = rotary[0][..., :1, :].expand(*rotary[0].shape[:-2], PREFIX, -1)[:1]
                    kwargs["position_embeddings"] = torch.ones_like(still), torch.zeros_like(still)
                return args, kwargs

            return pre

        hooks = [
            self.modules[n].register_forward_pre_hook(swap(n), with_kwargs=True) for n in self.prompts
        ]  # fmt: skip
        outputs = [
            self.modules[n].register_forward_hook(
                lambda module, args, kwargs, output: (torch.zeros(2, self.length, output[0].shape[-1]), *output[1:]),
                with_kwargs=True,
            )
            for n in self.prompts
        ]
        try:
            with attending(self.part, tuple(self.modules[n] for n in self.prompts), record):
                answer(self.part, **self.batch)
        finally:
            for hook in (*hooks, *outputs):
                hook.remove()
        return found

    def __call__(self, batch: dict[str, Tensor]) -> Tensor:
        self.batch = inputs(self.name)
        lengths: list[int] = []
        probe = self.modules[0].register_forward_hook(lambda m, a, output: lengths.append(output[0].shape[1]))
        answer(self.part, **self.batch)
        probe.remove()
        self.length = lengths[0]
        prefixes = self.prefixes()

        def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float,
                   causal: bool) -> Tensor:  # fmt: skip
            words = plain(module, query, key, value, mask, scaling, causal)
            number = next(i for i, other in enumerate(self.modules) if other is module)
            if number not in prefixes:
                return words
            key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in prefixes[number])
            branch = (query @ key.mT * scaling).softmax(-1) @ value
            return words + torch.tanh(self.gates[number]).view(-1, 1, 1) * branch

        with attending(self.part, self.modules, attend):
            return answer(self.part, **batch)


def adapted(name: str, **config: Any) -> tuple[nn.Module, nn.Module, lak.ZeroGateAdapter]:
    model, part = build(name)
    torch.manual_seed(5)
    adapter = lak.attach_adapter(part, lak.AdapterConfig(prefix_length=PREFIX, **config), trainable=[])
    return model, part, adapter


def open_gates(adapter: lak.ZeroGateAdapter) -> None:
    with torch.no_grad():
        for layer in adapter.layers.values():
            layer.gate.uniform_(0.5, 1.5)


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, atol=2e-5 * float(expected.detach().abs().max()), rtol=1e-4)


def padded(name: str, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The second row three words shorter, on the side that the task wants."""
    ids, mask = batch["input_ids"].clone(), torch.ones_like(batch["input_ids"])
    hidden = slice(0, 3) if EXAMPLES[name].task == "generate" else slice(-3, None)
    ids[1, hidden], mask[1, hidden] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("name", EXAMPLES)
def test_architecture(name: str, tmp_path: Path) -> None:
    model, part, adapter = adapted(name)
    batch, task = inputs(name), EXAMPLES[name].task
    assert adapter.base["model_type"] == EXAMPLES[name].model_type

    # Gate 0: the base model, and bit for bit the same kernel without a prefix.
    closed = answer(part, **batch).detach()
    close(closed, answer(build(name)[1], **batch))
    lak.set_adapter(part, None)
    assert torch.equal(answer(part, **batch), closed)
    lak.set_adapter(part, "default")

    # Open gates: the formula, in results and gradients, and nothing else learns.
    open_gates(adapter)
    expected = Expected(name, adapter)
    got, wanted = answer(part, **batch), expected(batch)
    close(got, wanted)
    assert (wanted - closed).abs().max() > 1e-3 * closed.abs().max()
    weights = torch.randn(got.shape, generator=torch.Generator().manual_seed(2))
    (got * weights).sum().backward()
    (wanted * weights).sum().backward()
    for number, layer in adapter.layers.items():
        close(layer.prompt.grad, expected.prompts[int(number)].grad)
        close(layer.gate.grad, expected.gates[int(number)].grad)
        assert layer.prompt.grad.any() and layer.gate.grad.any()
    assert {n.rsplit(".", 1)[1] for n, p in model.named_parameters() if p.grad is not None} == {"prompt", "gate"}

    if "input_ids" in batch:  # Padding
        with_padding = padded(name, batch)
        real = with_padding["attention_mask"].bool()
        got, wanted = answer(part, **with_padding), expected(with_padding)
        if got.dim() == 3:
            got, wanted = got[real], wanted[real]
        close(got, wanted)
    if task == "generate":
        generates_as_whole_passes(part, batch["input_ids"])

    # Save, load, detach.
    adapter.save_pretrained(tmp_path)
    _, other = build(name)
    before = answer(other, **batch)
    lak.load_adapter(other, tmp_path, trainable=[])
    assert torch.equal(answer(other, **batch), answer(part, **batch))
    lak.detach_adapter(other)
    assert torch.equal(answer(other, **batch), before)


def generates_as_whole_passes(model: nn.Module, tokens: Tensor) -> None:
    with torch.no_grad():
        whole = tokens[:, :5]
        for _ in range(4):
            whole = torch.cat([whole, model(input_ids=whole, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        for cache in ("dynamic", "static"):
            got = model.generate(
                tokens[:, :5], attention_mask=torch.ones_like(tokens[:, :5]), max_new_tokens=4, do_sample=False,
                eos_token_id=None, cache_implementation=cache, disable_compile=True,
            )  # fmt: skip
            assert torch.equal(got, whole), cache
