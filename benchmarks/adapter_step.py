"""What an attached adapter costs a whole model: training step and decode step, beside the frozen base and PEFT.

    python benchmarks/adapter_step.py [--rounds 30] [--threads 2]

Model: Llama, 4 layers, hidden 512, 8 heads, feed-forward 1376, vocabulary 4096. Prompts of length 10 in all layers, gates
0.5. Contestants take turns, so that a change of the machine's speed meets all of them; ratios are of medians.

train   forward, mean cross-entropy, backward; 2 sequences of 512 tokens, no padding, no cache. The frozen base has
        nothing to train: there the embedded tokens require the gradient, so that its backward pass runs down to where
        an adapter's does. Optimizer steps are left out (8 small tensors).
decode  one new token for each of 2 sequences against a DynamicCache of 512 tokens, in evaluation, without gradients.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from peft import AdaptionPromptConfig, get_peft_model
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import llama_adapter_kernels as lak

BATCH, LENGTH, VOCABULARY, PREFIX = 2, 512, 4096, 10
CONFIG = LlamaConfig(
    hidden_size=512, intermediate_size=1376, num_attention_heads=8, num_key_value_heads=8, num_hidden_layers=4,
    vocab_size=VOCABULARY, attn_implementation="sdpa",
)  # fmt: skip


def base(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(CONFIG).to(dtype).requires_grad_(False)


def ours(dtype: torch.dtype) -> nn.Module:
    model = base(dtype)
    adapter = lak.attach_adapter(model, lak.AdapterConfig(prefix_length=PREFIX))
    with torch.no_grad():
        for layer in adapter.layers.values():
            layer.gate.fill_(0.5)
    return model


def peft(dtype: torch.dtype) -> nn.Module:
    config = AdaptionPromptConfig(adapter_len=PREFIX, adapter_layers=4, task_type="CAUSAL_LM")
    model = get_peft_model(base(dtype), config).base_model.model
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.adaption_gate.fill_(0.5)
    return model


CONTESTANTS = {"frozen base, SDPA": base, "adapter, this package": ours, "adapter, PEFT": peft}


def training(model: nn.Module, tokens: Tensor) -> Callable[[], None]:
    model.train()
    frozen = not any(parameter.requires_grad for parameter in model.parameters())

    def step() -> None:
        embedded = model.model.embed_tokens(tokens).detach().requires_grad_(frozen)
        logits = model(inputs_embeds=embedded, use_cache=False).logits
        nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten()).backward()
        model.zero_grad(set_to_none=True)

    return step


def decoding(model: nn.Module, tokens: Tensor) -> Callable[[], None]:
    model.eval()
    cache = DynamicCache(config=CONFIG)
    with torch.no_grad():
        model(tokens, past_key_values=cache)

    def step() -> None:
        with torch.no_grad():
            model(tokens[:, :1], past_key_values=cache)
        cache.crop(-1)

    return step


def race(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 2):  # two to warm up
        for name, step in steps.items():
            begin = time.perf_counter()
            step()
            if number >= 2:
                times[name].append((time.perf_counter() - begin) * 1e3)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="of the training step; decoding takes ten times as many")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: both")
    parser.add_argument("--mode", choices=["train", "decode"], help="default: both")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    tokens = torch.randint(0, VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    print(f"{'':30}{'median ms':>11}{'best ms':>10}{'ratio':>8}{'of best':>9}")
    for dtype in [arguments.dtype] if arguments.dtype else ["float32", "bfloat16"]:
        for mode in [arguments.mode] if arguments.mode else ["train", "decode"]:
            prepare, rounds = (training, arguments.rounds) if mode == "train" else (decoding, arguments.rounds * 10)
            steps = {name: prepare(make(getattr(torch, dtype)), tokens) for name, make in CONTESTANTS.items()}
            times = race(steps, rounds)
            middle = {name: statistics.median(values) for name, values in times.items()}
            best = {name: min(values) for name, values in times.items()}
            first = next(iter(times))
            print(f"{dtype} {mode}")
            for name in times:
                ratios = f"{middle[name] / middle[first]:8.3f}{best[name] / best[first]:9.3f}"
                print(f"  {name:28}{middle[name]:11.2f}{best[name]:10.2f}{ratios}")


if __name__ == "__main__":
    main()
