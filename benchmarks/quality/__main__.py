"""All comparisons on the device there is: python -m benchmarks.quality --help"""

import argparse
from pathlib import Path

import torch

from benchmarks.quality.encoders import EncoderTask
from benchmarks.quality.language import LanguageTask
from benchmarks.quality.runs import Task, compare
from llama_adapter_kernels.ops.registration import cpu_instruction_sets

# Of the language model: 1,280 rows on a GPU, 128 shorter ones on a CPU, where a run then takes a minute or two.
GPU_SIZES = {"steps": 80, "batch": 16, "max_length": 256, "validation": 64, "test": 256, "rows_at_once": 16}
CPU_SIZES = {"steps": 16, "batch": 8, "max_length": 192, "validation": 16, "test": 64, "rows_at_once": 8}


def tasks_of(options: argparse.Namespace) -> dict[str, Task]:
    """What can be learned with the material that is given."""
    tasks: dict[str, Task] = {}
    if options.model and options.data:
        sizes = dict(GPU_SIZES if options.device == "cuda" else CPU_SIZES)
        sizes["steps"] = options.steps or sizes["steps"]
        quick = options.device == "cpu" and "avx512_bf16" in cpu_instruction_sets()[0]
        tasks["language"] = LanguageTask(
            options.model,
            options.data,
            options.device,
            autocast=quick if options.autocast is None else options.autocast,
            **sizes,
        )
    if options.encoder and options.reviews:
        tasks["reviews"] = EncoderTask("reviews", options.device, options.encoder, options.reviews, steps=63, test=1000)
    tasks["digits"] = EncoderTask(
        "digits", options.device, training=200, validation=100, test=596, steps=600, rank=4, rates_times=10
    )
    return {name: task for name, task in tasks.items() if name in options.only}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    parser.add_argument("--model", help="folder of a Llama-like model: SmolLM2-135M-Instruct")
    parser.add_argument("--data", type=Path, help="instruction rows for it, JSON")
    parser.add_argument("--encoder", help="folder of a BERT-like model: all-MiniLM-L6-v2")
    parser.add_argument("--reviews", type=Path, help="source distribution of vaderSentiment 3.3.2, .tar.gz")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=600.0, help="no run begins or goes on after that")
    parser.add_argument("--jobs", type=int, help="processes at a time; default: 5 on a GPU, 2 on a CPU")
    parser.add_argument(
        "--steps", type=int, help="of the language model; default: 80 of 16 rows on a GPU, 16 of 8 on a CPU"
    )
    parser.add_argument(
        "--autocast", action=argparse.BooleanOptionalAction,
        help="the language model computes in bfloat16, weights in float32; default: on a CPU that is quick at it",
    )  # fmt: skip
    parser.add_argument("--only", nargs="+", default=["language", "reviews", "digits"])
    parser.add_argument("--output", type=Path, required=True, help="JSON file; one that is there is gone on with")
    options = parser.parse_args(arguments)
    jobs = options.jobs or (5 if options.device == "cuda" else 2)
    compare(tasks_of(options), options.output, torch.device(options.device), jobs=jobs, minutes=options.minutes)


if __name__ == "__main__":
    main()
