"""The table of a recorded race of fine-tuning, in benchmarks/README.md between its marks:

python -m benchmarks.training.finetuning_report benchmarks/results/training/NAME.json [--page benchmarks/README.md]
"""

import argparse
import json
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- fine-tuning -->", "<!-- /fine-tuning -->"
# What this project holds itself to: at least so many times the tokens per second, at most so much of the memory.
SPEED = {"adaption-prompt": 1.5, "trl-lora": 1.2}
MEMORY = 0.8


def table(recorded: dict[str, Any]) -> list[str]:
    """One row per contestant; a pair of columns per dtype."""
    dtypes = list(recorded["results"])
    head = [f"{dtype} tokens/s | ours is | peak memory | of ours" for dtype in dtypes]
    lines = [f"| | trained | {' | '.join(head)} |", f"|---|--:{'|--:' * (4 * len(dtypes))}|"]
    for name, title in recorded["titles"].items():
        cells, trained = [], ""
        for dtype in dtypes:
            found, ours = recorded["results"][dtype][name], recorded["results"][dtype].get("ours", {})
            if "problem" in found:
                cells.append(f"{found['problem']} | | | ")
                continue
            trained = f"{found['parameters']:,}"
            faster, smaller = "", ""
            if name != "ours" and "problem" not in ours and ours:
                faster = f"{ours['tokens_per_second'] / found['tokens_per_second']:.2f}x"
                smaller = f"{ours['peak_bytes'] / found['peak_bytes']:.2f}"
            cells.append(
                f"{found['tokens_per_second']:,.0f} | {faster} | {found['peak_bytes'] / 2**30:.2f} GiB | {smaller}"
            )
        lines.append(f"| {title} | {trained} | {' | '.join(cells)} |")
    return lines


def verdicts(recorded: dict[str, Any]) -> list[str]:
    """Which of the floors hold, one line each."""
    lines = []
    for dtype, results in recorded["results"].items():
        if "problem" in results.get("ours", {"problem": ""}):
            continue
        ours = results["ours"]
        for name, floor in SPEED.items():
            theirs = results.get(name, {"problem": ""})
            if "problem" in theirs:
                continue
            faster = ours["tokens_per_second"] / theirs["tokens_per_second"]
            smaller = ours["peak_bytes"] / theirs["peak_bytes"]
            title = recorded["titles"][name]
            lines.append(_verdict(f"{dtype}: tokens/s over {title}", faster, floor, faster >= floor))
            lines.append(_verdict(f"{dtype}: memory of {title}", smaller, MEMORY, smaller <= MEMORY))
    return lines


def _verdict(what: str, ratio: float, floor: float, holds: bool) -> str:
    return f"- {what}: {ratio:.2f} (goal {floor}): {'held' if holds else '**missed**'}"


def write(results: Path, page: Path) -> None:
    """The table and what is said about it, between the marks of `page`."""
    recorded = json.loads(results.read_text())
    machine = recorded["machine"]
    lines = [
        *table(recorded),
        "",
        *verdicts(recorded),
        "",
        f"{recorded['model']} on {recorded['data']}, {recorded['rows']} rows a step, medians of {recorded['rounds']} steps "
        f"on {machine['cpu']}, {machine['threads']} threads, {machine['torch_instruction_set']}, torch {machine['torch']}, "
        f"commit {machine['commit']} ([{results.name}](results/training/{results.name})).",
    ]
    head, _, rest = page.read_text().partition(BEGIN)
    page.write_text(f"{head}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--page", type=Path, default=Path("benchmarks/README.md"))
    given = parser.parse_args()
    write(given.results, given.page)
