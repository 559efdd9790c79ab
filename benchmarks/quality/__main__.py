"""All comparisons on the device there is: python -m benchmarks.quality --help"""

import argparse
from pathlib import Path

import torch

from benchmarks.quality.encoders import EncoderTask
from benchmarks.quality.language import LanguageTask
from benchmarks.quality.runs import Task, compare


def tasks_of(options: argparse.Namespace) -> dict[str, Task]:
    """What can be learned with the material that is given."""
    tasks: dict[str, Task] = {}
    if options.model and options.data:
        tasks["language"] = LanguageTask(
            options.model, options.data, options.device, steps=options.steps,
            rows_at_once=16 if options.device == "cuda" else 4, validation=options.test // 4, test=options.test,
        )  # fmt: skip
    if options.encoder and options.reviews:
        tasks["reviews"] = EncoderTask(
            "reviews", options.device, options.encoder, options.reviews, steps=options.encoder_steps
        )
    tasks["digits"] = EncoderTask(
        "digits",
        options.device,
        training=200,
        validation=100,
        test=596,
        steps=options.encoder_steps,
        rank=4,
        rates_times=3,
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
    parser.add_argument("--jobs", type=int, help="processes at a time; default: 5 on a GPU, 1 on a CPU")
    parser.add_argument("--steps", type=int, default=80, help="of 16 rows, of the language model")
    parser.add_argument("--encoder-steps", type=int, default=190, help="of 32 rows, of the encoders")
    parser.add_argument("--test", type=int, default=256, help="held-out rows of the language model's data")
    parser.add_argument("--only", nargs="+", default=["language", "reviews", "digits"])
    parser.add_argument("--output", type=Path, required=True, help="JSON file; one that is there is gone on with")
    options = parser.parse_args(arguments)
    jobs = options.jobs or (5 if options.device == "cuda" else 1)
    compare(tasks_of(options), options.output, torch.device(options.device), jobs=jobs, minutes=options.minutes)


if __name__ == "__main__":
    main()
