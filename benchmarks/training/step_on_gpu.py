"""A training step of LLaMA-7B's shape on one GPU: this package, two attention calls, PEFT's AdaptionPrompt and LoRA.

    python benchmarks/training/step_on_gpu.py [--config 7b|1b|tiny] [--device cuda|cpu] [--output step.json]

The model has random bfloat16 weights made on the device: nothing is read, nothing comes from a network. Every contestant
trains on the same steps of 8192 tokens, made of sequences as long as Alpaca's. Packed contestants run them without padding
through the package's own pieces (response tokens alone meet the head, in chunks); rivals run padded batches as transformers'
data collators make them, with the loss of transformers, as many rows at a time as memory has room for.

Results are written as they come, and contestants for which the time (--seconds) has run out are named.
"""

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_contestants import SHAPES, TIMED, Contestant, build, checkpointing, contestants, prepared
from torch import Tensor

from llama_adapter_kernels.bench import lengths
from llama_adapter_kernels.bench.machine import facts
from llama_adapter_kernels.training.fused_parts import fuse_parts
from llama_adapter_kernels.training.loss import response_loss
from llama_adapter_kernels.training.packing import StepPlan, pack
from llama_adapter_kernels.training.tokens import Example

RESPONSE = 0.5  # of Alpaca's tokens, about so many are the response
EPOCHS = 5
WARM_UP = 3
_MOST_ROWS = 16  # of a padded micro-batch; halved until it fits


class Data:
    """Steps of sequences as long as Alpaca's, of random tokens."""

    def __init__(self, tokens: int, vocabulary: int, steps: int) -> None:
        longest = max(8, min(lengths.LONGEST, tokens // 4))
        self.lengths = [min(length, longest) for length in lengths.alpaca_lengths(max(2000, steps * tokens // 64))]
        generator = torch.Generator().manual_seed(0)
        self.plan = StepPlan(self.lengths, 0, batch_size=1, tokens_per_step=tokens, epochs=1, max_steps=steps)
        self.examples = [
            Example(tuple(torch.randint(3, vocabulary, (n,), generator=generator).tolist()), n - int(n * RESPONSE))
            for n in self.lengths
        ]

    def packed(self, step: int, pieces: int, device: torch.device) -> list[dict[str, Any]]:
        hands = self.plan.hands(step, pieces)
        batches = [pack([self.examples[i] for i in hand]) for hand in hands if hand]
        return [{k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()} for batch in batches]

    def padded(self, step: int, rows: int, device: torch.device) -> list[dict[str, Tensor]]:
        chosen = [self.examples[i] for i in self.plan.step(step)]
        batches = []
        for start in range(0, len(chosen), rows):
            part = chosen[start : start + rows]
            longest = max(map(len, part))
            tokens, labels = torch.zeros(len(part), longest, dtype=torch.long), torch.full((len(part), longest), -100)
            for row, example in enumerate(part):
                tokens[row, : len(example)] = torch.tensor(example.tokens)
                labels[row, : len(example)] = torch.tensor(example.labels)
            mask = torch.arange(longest) < torch.tensor([len(example) for example in part])[:, None]
            batch = {"input_ids": tokens, "labels": labels, "attention_mask": mask.long()}
            batches.append({name: tensor.to(device) for name, tensor in batch.items()})
        return batches

    def tokens(self, step: int) -> int:
        return self.plan.tokens(self.plan.step(step))


def measure(contestant: Contestant, model: Any, data: Data, device: torch.device, trace: bool) -> dict[str, Any]:
    """Times of the steps, peak memory, tokens per second; with `trace`, one more step kernel by kernel."""
    packed = contestant.kind in ("ours", "varlen")
    rows = _MOST_ROWS
    torch.manual_seed(0)  # the same prompts for all that have some
    with prepared(contestant, model) as (called, trained), checkpointing(model, contestant.low):
        optimizer = torch.optim.AdamW(
            trained, lr=1e-3, weight_decay=0.02, betas=(0.9, 0.95), fused=device.type == "cuda"
        )

        def step(number: int) -> float:
            batches = data.packed(number, contestant.pieces, device) if packed else data.padded(number, rows, device)
            live = sum(int((batch["labels"] >= 0).sum()) for batch in batches)
            total = torch.zeros((), device=device)
            for batch in batches:
                if packed:
                    loss = response_loss(called, batch)[0] / live
                else:
                    loss = called(**batch, num_items_in_batch=torch.tensor(live, device=device)).loss
                loss.backward()
                total += loss.detach()
                del loss  # and what is left of its graph, before the next micro-batch begins
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return float(total)  # waits for the device

        losses: list[float] = []
        seconds: list[float] = []
        while not losses:
            try:
                losses = [step(number) for number in range(WARM_UP if contestant.timed == TIMED else 1)]
            except torch.OutOfMemoryError:
                if packed or rows == 1:
                    raise
            if not losses:  # out of the handler, whose error keeps the tensors of its frames alive
                rows //= 2
                optimizer.zero_grad(set_to_none=True)
                empty(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        first = len(losses)
        for number in range(first, first + contestant.timed):
            begun = time.perf_counter()
            losses.append(step(number % data.plan.total_steps))
            seconds.append(time.perf_counter() - begun)
        tokens = sum(data.tokens(number % data.plan.total_steps) for number in range(first, first + contestant.timed))
        result = {
            "tokens_per_second": tokens / sum(seconds), "step_seconds": seconds,
            "median_step_seconds": statistics.median(seconds), "tokens_per_step": tokens / len(seconds),
            "peak_gib": torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None,
            "trained_parameters": sum(tensor.numel() for tensor in trained), "losses": losses,
            "rows_at_a_time": None if packed else rows,
        }  # fmt: skip
        if trace:
            result["kernels"] = kernels(lambda: step(first), device)
        return result


def kernels(step: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """Seconds of one step by kernel, the longest first."""
    from torch.profiler import ProfilerActivity, profile

    activity = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
    with profile(activities=[activity]) as found:
        step()
    spent = {
        event.key: (event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total) / 1e6
        for event in found.key_averages()
    }
    largest = sorted(((name, s) for name, s in spent.items() if s > 0), key=lambda pair: -pair[1])
    return {"seconds": sum(s for _, s in largest), "longest": {name[:160]: s for name, s in largest[:40]}}


def empty(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def ceilings(shape: tuple[int, ...], device: torch.device) -> dict[str, float]:
    """FLOP/s of the step's own matrix products, bytes/s of a copy."""
    tokens, hidden, inner = shape[5], shape[0], shape[1]
    left = torch.randn(tokens, hidden, device=device).bfloat16()
    right = torch.randn(hidden, inner, device=device).bfloat16()

    def best(call: Callable[[], object]) -> float:
        times = []
        for _ in range(6):
            wait(device)
            begun = time.perf_counter()
            for _ in range(5):
                call()
            wait(device)
            times.append((time.perf_counter() - begun) / 5)
        return min(times)

    target = torch.empty_like(left)
    return {
        "gemm_bfloat16": 2.0 * tokens * hidden * inner / best(lambda: left @ right),
        "copy": 2.0 * left.nbytes / best(lambda: target.copy_(left)),
    }


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", choices=list(SHAPES), default="7b")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--output", type=Path, default=Path("step_on_gpu.json"))
    parser.add_argument("--seconds", type=float, default=85.0, help="no contestant begins after so many")
    parser.add_argument("--only", help="contestants whose name contains this")
    options = parser.parse_args()
    begun, device, shape = time.perf_counter(), torch.device(options.device), SHAPES[options.config]
    results: dict[str, Any] = {"config": options.config, "machine": {}, "ceilings": {}, "contestants": {}}

    def write() -> None:
        results["seconds"] = time.perf_counter() - begun
        options.output.write_text(json.dumps(results, indent=1))

    for name, call in (("machine", lambda: facts(device)), ("ceilings", lambda: ceilings(shape, device))):
        try:
            results[name] = call()
        except Exception as error:
            results[name] = {"error": f"{type(error).__name__}: {error}"}
    empty(device)
    print(" ".join(f"{name} {rate / 1e12:.3g} T/s" for name, rate in results["ceilings"].items() if name != "error"))
    model = build(shape, device)
    results["weights_gib"] = sum(parameter.nbytes for parameter in model.parameters()) / 2**30
    data = Data(shape[5], shape[4], WARM_UP + TIMED)
    wait(device)
    print(f"model and data after {time.perf_counter() - begun:.1f} s", flush=True)
    whole = sum(lengths.alpaca_lengths(lengths.EXAMPLES)) * EPOCHS
    traced = False
    for contestant in contestants(options.device):
        if options.only and options.only not in contestant.name:
            continue
        try:
            if time.perf_counter() - begun > options.seconds:
                raise TimeoutError(f"after {options.seconds:.0f} s none begins")
            subject = build(shape, device) if contestant.fused else model  # patched for good
            if contestant.fused and not fuse_parts(subject):
                raise RuntimeError("liger-kernel does not know the model")
            found = measure(contestant, subject, data, device, trace=not traced or contestant.fused)
            traced = True
            peak = "" if found["peak_gib"] is None else f", peak {found['peak_gib']:6.2f} GiB"
            print(
                f"{contestant.name:34} {found['tokens_per_second']:9.0f} tokens/s, step {found['median_step_seconds']:.4f} s"
                f"{peak}, Alpaca x {EPOCHS}: {whole / found['tokens_per_second'] / 60:.1f} min",
                flush=True,
            )
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"}
            print(f"{contestant.name:34} {found['error'][:150]}", flush=True)
        results["contestants"][contestant.name] = found
        subject = None
        model.zero_grad(set_to_none=True)
        empty(device)
        write()
    write()
    print(f"{options.output} after {time.perf_counter() - begun:.1f} s")


if __name__ == "__main__":
    main()
