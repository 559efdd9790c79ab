"""Eight sequences with eight adapters in one batch, beside eight single runs and a batch with one adapter.

    python benchmarks/many_adapters.py [--shape smollm2-135m] [--rounds 5] [--tokens 32] [--dtype float32]

Models have random weights and a prompt of 10 slots in every layer. Every contestant generates greedily from 8 prompts of 64
tokens; they take turns, and ratios are of medians. What a batch can gain depends on the model: one token reads every weight,
whether for one sequence or for eight, so the gain is large where the weights do not fit into caches, as those of models
that people serve do not, and small where they nearly do. The last line says what the base model's own matrix products, which
are torch's, gain by eight rows instead of one: no batch gains more.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import llama_adapter_kernels as lak

SHAPES = {
    "small": {  # 14.7 million parameters
        "hidden_size": 512, "intermediate_size": 1376, "num_attention_heads": 8, "num_key_value_heads": 8,
        "num_hidden_layers": 4, "vocab_size": 4096,
    },
    "smollm2-135m": {
        "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3,
        "num_hidden_layers": 30, "vocab_size": 49152, "tie_word_embeddings": True,
    },
}  # fmt: skip
COUNT, PROMPT = 8, 64


def contestants(shape: str, tokens: int, dtype: torch.dtype) -> dict[str, Callable[[], torch.Tensor]]:
    """By name, each generating `tokens` tokens for every prompt."""
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[shape], attn_implementation="sdpa")
    model = LlamaForCausalLM(config).to(dtype).eval()
    names = [f"adapter{i}" for i in range(COUNT)]
    for name in names:
        adapter = lak.attach_adapter(model, lak.AdapterConfig(prefix_length=10), name)
        for layer in adapter.layers.values():
            torch.nn.init.constant_(layer.gate, 0.5)
    prompts = torch.randint(3, 4096, (COUNT, PROMPT))
    options = {"max_new_tokens": tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    def mixed() -> torch.Tensor:
        with lak.adapters_per_sequence(model, names):
            return model.generate(prompts, **options)

    def one_adapter() -> torch.Tensor:
        lak.set_adapter(model, names[0])
        return model.generate(prompts, **options)

    def single_runs() -> torch.Tensor:
        rows = []
        for name, prompt in zip(names, prompts, strict=True):
            lak.set_adapter(model, name)
            rows.append(model.generate(prompt[None], **options))
        return torch.cat(rows)

    return {"8 adapters, one batch": mixed, "1 adapter, one batch": one_adapter, "8 adapters, 8 runs": single_runs}


def gain_of_products(shape: str, dtype: torch.dtype, rounds: int) -> float:
    """How much faster the model's linear layers take COUNT rows at once than one by one."""
    model = LlamaForCausalLM(LlamaConfig(**SHAPES[shape])).to(dtype)
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    inputs = {
        rows: {n: torch.randn(rows, n, dtype=dtype) for n in {x.in_features for x in linears}} for rows in (1, COUNT)
    }
    times: dict[int, list[float]] = {1: [], COUNT: []}
    for number in range(2 * rounds + 1):
        for rows, of_width in inputs.items():
            begin = time.perf_counter()
            for linear in linears:
                linear(of_width[linear.in_features])
            if number:
                times[rows].append(time.perf_counter() - begin)
    return COUNT * statistics.median(times[1]) / statistics.median(times[COUNT])


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    runs = contestants(options.shape, options.tokens, getattr(torch, options.dtype))
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(options.rounds + 1):  # one to warm up
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            if number:
                times[name].append(time.perf_counter() - begin)
    middle = {name: statistics.median(values) for name, values in times.items()}
    mixed = middle["8 adapters, one batch"]
    for name, value in middle.items():
        print(
            f"{name:24}{COUNT * options.tokens / value:9.0f} tokens/s{value / mixed:8.3f} times the mixed batch's time"
        )

    gain = gain_of_products(options.shape, getattr(torch, options.dtype), options.rounds)
    print(
        f"over 8 runs {middle['8 adapters, 8 runs'] / mixed:.2f}x; the base model's matrix products alone {gain:.2f}x"
    )


if __name__ == "__main__":
    main()
