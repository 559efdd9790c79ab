"""What MkDocs does besides rendering docs/: formulas become MathML, and four pages are made from code and recorded results.

api.md            the public names of the package
command-line.md   every command and option
numbers.md        tables and plots of benchmarks/results, and the table of fine-tuning
quality.md        benchmarks/quality/README.md with its plots
"""

import html
import io
import re
import sys
from pathlib import Path
from typing import Any

import latex2mathml.converter
from mkdocs.structure.files import File, Files
from typer.testing import CliRunner

ROOT = Path(__file__).parents[1]
NUMBERS = """\
# Measured numbers

Recorded by `llama-adapter bench` and drawn by `llama-adapter bench-report`. Before a contestant is timed it has to give the
results of the float64 reference; contestants then take turns, and figures are medians over rounds. "Two SDPA calls" is the
fastest composition of two `scaled_dot_product_attention` calls and a multiply-add in that race, "eager / PEFT" what adapters
ship with elsewhere. How it is done in detail is written in `benchmarks/README.md`.
"""
sys.path.insert(0, str(ROOT))

_CODE = re.compile(r"(^```.*?^```|`[^`\n]+`)", re.MULTILINE | re.DOTALL)
_MATH = re.compile(r"\$\$(.+?)\$\$|\$([^$\n]+?)\$", re.DOTALL)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """$inline$ and $$display$$ LaTeX outside of code, as the browser renders it without help."""

    def convert(match: re.Match[str]) -> str:
        if match[1] is not None:
            return f'<div class="math">{latex2mathml.converter.convert(match[1], display="block")}</div>'
        return f"<span>{latex2mathml.converter.convert(match[2])}</span>"  # <math> alone would begin a block

    parts = _CODE.split(markdown)  # text, code, text, code, ...
    return "".join(part if number % 2 else _MATH.sub(convert, part) for number, part in enumerate(parts))


def on_files(files: Files, config: Any) -> Files:
    pages: dict[str, str | bytes] = {"examples.md": _examples(), "api.md": _api(), "command-line.md": _command_line()}
    pages |= _numbers() | _quality()
    for name, content in pages.items():
        files.append(File.generated(config, name, content=content))
    return files


def _examples() -> str:
    """In the order of the table in examples/README.md, which also says what each of them shows."""
    text = (ROOT / "examples" / "README.md").read_text()
    for name, shows in re.findall(r"^\| \[(\w+\.py)\].*?\| (.+?) \|$", text, re.MULTILINE):
        code = (ROOT / "examples" / name).read_text()
        text += f"\n## {shows[0].upper()}{shows[1:]}\n\n```python title='examples/{name}'\n{code}```\n"
    return re.sub(r"^\|.*\n", "", text, flags=re.MULTILINE)


def _api() -> str:
    import llama_adapter_kernels as lak

    groups: dict[str, list[str]] = {"The operation": [], "Adapters in models": []}
    for name in lak.__all__:
        module = getattr(lak, name).__module__
        groups["The operation" if ".ops." in module else "Adapters in models"].append(f"::: {module}.{name}")
    lines = ["# API", "", "Every name here is imported from `llama_adapter_kernels`.", ""]
    for title, names in groups.items():
        lines += [
            f"## {title}",
            "",
            *(line for name in names for line in (name, "    options: {heading_level: 3}", "")),
        ]
    return "\n".join(lines)


def _command_line() -> str:
    from typer.cli import app

    arguments = ["llama_adapter_kernels.cli", "utils", "docs", "--name", "llama-adapter", "--title", "Command line"]
    run = CliRunner().invoke(app, arguments)
    if run.exit_code != 0:
        raise RuntimeError(f"typer could not describe the command line: {run.output}")
    return html.unescape(run.stdout)


def _numbers() -> dict[str, str | bytes]:
    from llama_adapter_kernels.bench import plots, report, results, tables

    made: dict[str, str | bytes] = {}
    lines = [NUMBERS]
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.json")):
        recorded = results.load(path)
        machine = recorded.machine
        lines += [f"## {machine.get('gpu') or machine['cpu']}, {machine['our_instruction_set']}", ""]
        for name, figure in plots.all_plots(recorded).items():
            image = io.BytesIO()
            figure.savefig(image, format="svg", metadata={"Date": None})
            made[f"images/{path.stem}-{name}.svg"] = image.getvalue()
            title, caption = report.CAPTIONS[name]
            lines += [f"### {title}", "", caption, "", f"![{title}](images/{path.stem}-{name}.svg)", ""]
        lines += ["### Table", "", tables.readme_table(recorded), ""]
        remarks = tables.remarks(recorded)
        lines += ["### Contestants that did not run", "", *(f"- {html.escape(remark)}" for remark in remarks), ""]
    race = re.search(r"<!-- fine-tuning -->\n(.+?)<!-- /", (ROOT / "benchmarks" / "README.md").read_text(), re.DOTALL)
    if race:
        lines += ["## Fine-tuning", "", "Whole training loops, a step each in turn: `make bench-training`.", ""]
        lines += [re.sub(r"\[([^\]]+)\]\(results/.*?\)", r"`\1`", race[1]), ""]
    return made | {"numbers.md": "\n".join(lines)}


def _quality() -> dict[str, str | bytes]:
    folder = ROOT / "benchmarks" / "quality"
    text = (folder / "README.md").read_text()
    made: dict[str, str | bytes] = {f"images/quality-{path.name}": path.read_bytes() for path in folder.glob("*.svg")}
    text = re.sub(r"\]\((\w+\.svg)\)", r"](images/quality-\1)", text)
    return made | {"quality.md": text.replace("[results](../results/quality)", "`benchmarks/results/quality`")}
