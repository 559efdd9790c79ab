"""Tables and plots of recorded comparisons: python -m benchmarks.quality.report RESULTS.json... [--folder FOLDER]

Writes the part of FOLDER/README.md between the two marks, and FOLDER/*.svg.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no screen needed
import matplotlib.pyplot as plt
import matplotlib.ticker

from benchmarks.quality.language import LAYERS, LENGTHS, MAIN
from benchmarks.quality.runs import Result, Run, best_rate

BEGIN, END = "<!-- quality results -->", "<!-- /quality results -->"
COLOURS = ("#d95f02", "#1f77b4", "#7f7f7f", "#2ca02c", "#98df8a", "#9467bd", "#333333")
ERROR_TITLES = {"reviews": "MiniLM, film reviews", "digits": "ViT, digits 5 to 9"}


def chosen(recorded: dict[str, Any], task: str) -> dict[str, list[Result]]:
    """By method in the order of the settings, the runs of all seeds at the best rate; without what failed or is missing.

    Of a method with prompts those of the main form (layers and length) alone.
    """
    about = recorded["tasks"][task]
    runs = [run for run in recorded["runs"] if run["task"] == task]
    found = {}
    for method, rates in about["rates"].items():
        mine = [run for run in runs if run["method"] == method]
        searched = about.get("rate_of", {}).get(method, method)
        grid = [run for run in runs if run["method"] == searched]
        rate = best_rate([Run(task, searched, rate, 0, *main_form(grid)) for rate in rates], grid)
        form = main_form(mine)
        same = [run for run in mine if run["rate"] == rate and (run["layers"], run["length"]) == form]
        if kept := [run for run in same if "error" not in run]:
            found[method] = sorted(kept, key=lambda run: run["seed"])
    return found


def main_form(runs: Sequence[Result]) -> tuple[int, int]:
    """(layers, length) that the learning rate was chosen for."""
    lengths = {run["length"] for run in runs}
    length = MAIN[1] if MAIN[1] in lengths else max(lengths, default=0)
    return max((run["layers"] for run in runs if run["length"] == length), default=0), length


def spread(values: Sequence[float], form: str = ".3f") -> str:
    """Mean and standard deviation."""
    if len(values) < 2:
        return f"{values[0]:{form}}"
    return f"{statistics.mean(values):{form}} ± {statistics.stdev(values):{form}}"


def language_tables(recorded: dict[str, Any]) -> list[str]:
    about, methods = recorded["tasks"]["language"], chosen(recorded, "language")
    tokens = next((runs[0]["tokens"] for runs in methods.values()), 0)
    before = [run["test_before"] for run in recorded["runs"] if "test_before" in run]
    lines = [
        "### A language model learns to answer",
        "",
        f"{about['model']}, {about['steps']} steps of {about['batch']} rows of {about['data']} ({tokens:,} tokens), cut off "
        f"after {about['max_length']} tokens, in {about['dtype']}. Loss on {about['test']} held-out rows in nats per "
        "response token: mean and standard deviation over the seeds.",
        "",
        "| method | trained parameters | learning rate | held-out loss | seeds |",
        "|---|--:|--:|--:|--:|",
    ]
    if before:
        lines.append(f"| before training | 0 | | {before[0]:.3f} | |")
    lines += [
        f"| {about['titles'][method]} | {runs[0]['parameters']:,} | {_rate(about, method, runs)} | "
        f"{spread([run['test'] for run in runs])} | {len(runs)} |"
        for method, runs in methods.items()
    ]
    lines += ["", recorded["measured"]["language"], "", "![Validation loss by step](curves.svg)", ""]
    return [*lines, *_ablations(recorded), *_answers(recorded)]


def _rate(about: dict[str, Any], method: str, runs: Sequence[Result]) -> str:
    """The learning rate, with a star where it is at an edge of what was tried."""
    rate, tried = runs[0]["rate"], about["rates"][method]
    star = "\\*" if rate in (min(tried), max(tried)) else ""
    return f"{rate:g}{star}"


def _ablations(recorded: dict[str, Any]) -> list[str]:
    runs = [
        run
        for run in recorded["runs"]
        if run["method"] == "zero-gate" and run["task"] == "language" and "error" not in run
    ]
    main = chosen(recorded, "language").get("zero-gate")
    if not main:
        return []
    most, length = main[0]["layers"], main[0]["length"]
    same_rate = [run for run in runs if run["rate"] == main[0]["rate"] and "error" not in run]

    def losses(layers: int, prompts: int) -> list[float]:
        return [run["test"] for run in same_rate if (run["layers"], run["length"]) == (layers, prompts)]

    by_layers = [(str(n), losses(n, length)) for n in (*(n for n in LAYERS if n < most), most)]
    by_length = [(str(n), losses(most, n)) for n in LENGTHS]
    lines = []
    for title, rows in ((f"layers (length {length})", by_layers), (f"length ({most} layers)", by_length)):
        if sum(bool(values) for _, values in rows) > 1:
            lines += [f"| {title} | held-out loss | seeds |", "|--:|--:|--:|"]
            lines += [f"| {name} | {spread(values)} | {len(values)} |" for name, values in rows if values]
            lines.append("")
    return ["Zero-init gates, at the learning rate chosen above:", "", *lines] if lines else []


def _answers(recorded: dict[str, Any]) -> list[str]:
    answered = [run for run in recorded["runs"] if run.get("answers") and run["prompts"]]
    if not answered:
        return []
    titles = recorded["tasks"]["language"]["titles"]
    lines = ["Answers to held-out instructions (greedy, cut off):", ""]
    for number, prompt in enumerate(answered[0]["prompts"]):
        lines += [f"> {_line(prompt)}", ""]
        for run in answered:
            if "before" in run["answers"]:
                lines.append(f"- before training: {_line(run['answers']['before'][number])}")
        lines += [f"- {titles[run['method']]}: {_line(run['answers']['after'][number])}" for run in answered]
        lines.append("")
    return lines


def _line(text: str) -> str:
    """On one line, with nothing that Markdown would take for its own."""
    line = " ".join(text.split()) or "(nothing)"
    for special in "\\*_#`[<|":
        line = line.replace(special, f"\\{special}")
    return line.replace("$", "&#36;")  # the web site would take it for a formula


def encoder_tables(recorded: dict[str, Any]) -> list[str]:
    lines = []
    for task, title in ERROR_TITLES.items():
        if task not in recorded["tasks"] or not (methods := chosen(recorded, task)):
            continue
        about = recorded["tasks"][task]
        lines += [
            f"### {title}", "",
            f"{about['steps']} steps of {about['batch']} of {about['training']:,} examples; wrong answers about "
            f"{about['test']:,} held-out ones, mean and standard deviation over the seeds.", "",
            "| method | trained parameters | learning rate | wrong answers | seeds |", "|---|--:|--:|--:|--:|",
            *(f"| {about['titles'][method]} | {runs[0]['parameters']:,} | {_rate(about, method, runs)} | "
              f"{spread([100 * run['test'] for run in runs], '.1f')} % | {len(runs)} |" for method, runs in methods.items()),
            "",
            recorded["measured"][task], "",
        ]  # fmt: skip
    return [*lines, "![Wrong answers by method](encoders.svg)", ""] if lines else []


def curves(recorded: dict[str, Any]) -> Any:
    """Validation loss by step, a line of means per method and a band from the least to the greatest seed: all methods, and
    those beside it that end below where the model began."""
    about, methods = recorded["tasks"]["language"], chosen(recorded, "language")
    starts = [runs[0]["validation_curve"][0][1] for runs in methods.values()]
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.8), layout="constrained")
    for axes, all_of_them in zip(panels, (True, False), strict=True):
        for colour, (method, runs) in zip(COLOURS, methods.items(), strict=False):
            steps = [step for step, _ in runs[0]["validation_curve"]]
            columns = list(zip(*([loss for _, loss in run["validation_curve"]] for run in runs), strict=True))
            if all_of_them or statistics.mean(columns[-1]) < min(starts) + 0.5:
                means = [statistics.mean(column) for column in columns]
                axes.plot(steps, means, color=colour, label=about["titles"][method], marker=".")
                axes.fill_between(steps, [min(c) for c in columns], [max(c) for c in columns], color=colour, alpha=0.15)
        axes.set(xlabel="optimizer step", ylabel="validation loss (nats per response token)")
        axes.grid(alpha=0.3, which="both")
        axes.legend()
    panels[0].set(yscale="log", title="all methods, logarithmic")
    panels[0].yaxis.set_major_formatter(matplotlib.ticker.ScalarFormatter())
    panels[0].yaxis.set_minor_formatter(matplotlib.ticker.ScalarFormatter())
    panels[1].set(title="those that learn")
    panels[1].set_ylim(top=min(starts) + 0.05)
    figure.suptitle(f"{about['model']} on {about['data']}, {about['batch']} rows a step")
    return figure


def encoder_bars(recorded: dict[str, Any]) -> Any:
    """Wrong answers by method, a bar for the mean and a dot per seed; one panel per task."""
    tasks = [task for task in ERROR_TITLES if task in recorded["tasks"] and chosen(recorded, task)]
    figure, panels = plt.subplots(1, len(tasks), figsize=(5 * len(tasks), 4), layout="constrained", squeeze=False)
    for axes, task in zip(panels[0], tasks, strict=True):
        methods = chosen(recorded, task)
        for place, (method, runs) in enumerate(methods.items()):
            shares = [100 * run["test"] for run in runs]
            axes.bar(place, statistics.mean(shares), color=COLOURS[0] if method == "zero-gate" else "#b0c4de")
            axes.plot([place] * len(shares), shares, "o", color="black", markersize=4)
        titles = recorded["tasks"][task]["titles"]
        axes.set_xticks(range(len(methods)), [titles[name] for name in methods], rotation=25, ha="right")
        axes.set(ylabel="wrong answers (%)", title=ERROR_TITLES[task])
        axes.grid(axis="y", alpha=0.3)
    return figure


def merged(paths: Sequence[Path]) -> dict[str, Any]:
    """Recorded comparisons as one: of a task that several files have, the last one counts."""
    found: dict[str, Any] = {"tasks": {}, "runs": [], "measured": {}}
    for path in paths:
        recorded = json.loads(path.read_text())
        for task, about in recorded["tasks"].items():
            found["tasks"][task], found["measured"][task] = about, measured_on(recorded["machine"], path)
            found["runs"] = [run for run in found["runs"] if run["task"] != task]
            found["runs"] += [run for run in recorded["runs"] if run["task"] == task]
    return found


def measured_on(machine: dict[str, Any], path: Path) -> str:
    """One sentence about device, versions and file."""
    threads = f"{machine['threads']} thread{'' if machine['threads'] == 1 else 's'}"
    device = machine.get("gpu") or f"{machine['cpu']}, {threads}"
    commit = f", commit {machine['commit']}" if machine["commit"] else ""
    return (
        f"Measured on {device}, torch {machine['torch']}, transformers {machine['transformers']}, PEFT "
        f"{machine['peft']}{commit}: `{path.name}` in [results](../results/quality)."
    )


def write(results: Sequence[Path], folder: Path) -> None:
    """Plots into `folder`, tables into its README.md between the marks."""
    recorded, lines = merged(results), []
    plt.rcParams["svg.hashsalt"] = "quality"
    parts: list[tuple[str, Callable[[dict[str, Any]], list[str]], str, Callable[[dict[str, Any]], Any]]] = [
        ("language", language_tables, "curves", curves), ("reviews digits", encoder_tables, "encoders", encoder_bars)
    ]  # fmt: skip
    for tasks, table, name, plot in parts:
        if any(task in recorded["tasks"] and chosen(recorded, task) for task in tasks.split()):
            lines += table(recorded)
            figure = plot(recorded)
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
            plt.close(figure)
    lines.append("\\* The best of the learning rates that were tried is the lowest or the highest of them.")
    page = folder / "README.md"
    head, _, rest = page.read_text().partition(BEGIN)
    page.write_text(f"{head}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--folder", type=Path, default=Path("benchmarks/quality"))
    given = parser.parse_args()
    write(given.results, given.folder)
