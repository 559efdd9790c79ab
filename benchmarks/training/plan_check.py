"""`llama-adapter plan` beside a profile: a training step of SmolLM2-135M's shape, random weights, on this CPU.

    python benchmarks/training/plan_check.py [--dtype bfloat16] [--tokens 1024] [--threads 2] [--output check.json]

Operations are counted by torch, bytes that autograd keeps by its hooks, seconds by torch's profiler, the best of some steps;
the plan measures a matrix product and a copy first. Products, attention and the rest are compared one by one.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from gpu_contestants import Contestant, prepared
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from llama_adapter_kernels.bench.lengths import alpaca_lengths
from llama_adapter_kernels.planning.devices import measure_cpu
from llama_adapter_kernels.planning.estimate import WIDTHS, Choice, Data, estimate
from llama_adapter_kernels.planning.memory import kept_activations
from llama_adapter_kernels.planning.operations import Adapter, Batch, step_parts
from llama_adapter_kernels.planning.shapes import BUILTIN, read_shape
from llama_adapter_kernels.testing.kept import kept_by_autograd
from llama_adapter_kernels.training.loss import response_loss
from llama_adapter_kernels.training.packing import pack
from llama_adapter_kernels.training.tokens import Example

MODEL, STEPS = "smollm2-135m", 5


def build(dtype: torch.dtype) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**BUILTIN[MODEL], max_position_embeddings=2048, use_cache=False)
    return LlamaForCausalLM(config).to(dtype).requires_grad_(False).train()


def examples(tokens: int, vocabulary: int) -> list[Example]:
    found: list[Example] = []
    for length in alpaca_lengths(1000):
        if sum(map(len, found)) + length <= tokens:
            found.append(Example(tuple(torch.randint(3, vocabulary, (length,)).tolist()), length - length // 2))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shape, dtype = read_shape(MODEL), getattr(torch, options.dtype)
    adapter = Adapter(shape.layers - 2)
    device = measure_cpu(options.dtype)
    model, chosen = build(dtype), examples(options.tokens, shape.vocabulary)
    batch, lengths = pack(chosen), [len(example) for example in chosen]
    counted = Batch.packed(lengths, sum(len(example) - example.prompt_length for example in chosen))
    with prepared(Contestant("ours", "ours", "cpu"), model) as (called, trained):
        measured = step_of(called, batch, trained)
    data = Data(counted.tokens, 1, counted.pairs / counted.tokens, counted.responses / counted.tokens)
    terms = estimate(shape, adapter, data, device, options.dtype, Choice(int(counted.tokens), False, False)).terms
    kinds = {part.name: part.kind for part in step_parts(shape, adapter, counted)}
    planned = dict.fromkeys(("products", "attention", "memory"), 0.0)
    for term in terms:
        planned[kinds.get(term.name, "memory")] += term.seconds
    width = WIDTHS[options.dtype]
    flop = sum(part.flop for part in step_parts(shape, adapter, counted, width=width) if part.kind == "products")
    kept = sum(kept_activations(shape, adapter, counted, width=width).values())
    print(f"{MODEL}, {options.dtype}, {counted.tokens:,} tokens, {options.threads} threads")
    print(f"products {device.products / 1e9:.1f} GFLOP/s, copy {device.copy / 1e9:.1f} GB/s")
    print(f"products, GFLOP     planned {flop / 1e9:9.2f}  counted  {measured['flop'] / 1e9:9.2f}")
    print(f"kept, MB            planned {kept / 1e6:9.1f}  measured {measured['kept'] / 1e6:9.1f}")
    for kind, seconds in planned.items():
        print(f"{kind:10}, seconds  planned {seconds:9.3f}  measured {measured[kind]:9.3f}")
    print(f"step, seconds       planned {sum(planned.values()):9.3f}  measured {measured['seconds']:9.3f}")
    if options.output:
        found = {"model": MODEL, "dtype": options.dtype, "tokens": counted.tokens, "threads": options.threads,
                 "rates": {"products": device.products, "copy": device.copy},
                 "planned": {**planned, "flop": flop, "kept": kept}, "measured": measured}  # fmt: skip
        options.output.write_text(json.dumps(found, indent=1))


def step_of(model: Any, batch: dict[str, Any], trained: list[torch.Tensor]) -> dict[str, float]:
    """Operations of matrix products, bytes kept and seconds by kind of a forward and a backward pass."""

    def step() -> None:
        response_loss(model, batch)[0].backward()
        for tensor in trained:
            tensor.grad = None

    step()
    with FlopCounterMode(display=False) as counter:
        step()
    losses: list[Any] = []
    size = kept_by_autograd(model, lambda: losses.append(response_loss(model, batch)[0]))
    size += losses.pop().grad_fn.gradient.nbytes
    rounds = []
    for _ in range(STEPS):
        begun = time.perf_counter()
        step()
        rounds.append(time.perf_counter() - begun)
    with profile(activities=[ProfilerActivity.CPU]) as found:
        step()
    spent = dict.fromkeys(("products", "attention", "memory"), 0.0)
    for event in found.key_averages():
        name = event.key
        kind = "products" if name in ("aten::mm", "aten::addmm", "aten::bmm") else "memory"
        kind = "attention" if name.startswith("llama_adapter_kernels::") else kind
        spent[kind] += event.self_cpu_time_total / 1e6
    return {"flop": float(counter.get_flop_counts()["Global"][torch.ops.aten.mm]), "kept": float(size),
            "seconds": min(rounds), **spent}  # fmt: skip


if __name__ == "__main__":
    main()
