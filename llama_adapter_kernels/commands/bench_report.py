"""`llama-adapter bench-report`."""

from pathlib import Path
from typing import Annotated

import typer

from llama_adapter_kernels.errors import UserError


def bench_report(
    files: Annotated[list[Path], typer.Argument(help="Result files of `llama-adapter bench`, of one machine.")],
    output: Annotated[Path, typer.Option(help="Folder for report.html and the plots.")] = Path("bench-report"),
    readme: Annotated[
        Path | None,
        typer.Option(help="Put the table between the markers of this file, and the overview beside it as speed.svg."),
    ] = None,
) -> None:
    """Write an HTML page with plots, and the Markdown table."""
    from llama_adapter_kernels.bench import report, results, tables

    try:
        merged = results.merge([results.load(path) for path in files], [str(path) for path in files])
    except results.ResultError as error:
        raise UserError(str(error)) from error
    if not any(entry.median is not None for entry in merged.measurements):
        raise UserError("no contestant of these files was timed, there is nothing to report")
    for path in report.write(merged, output):
        typer.echo(f"written: {path}")
    if readme is not None:
        try:
            names = [path.resolve().relative_to(readme.resolve().parent).as_posix() for path in files]
            text = tables.insert_in_readme(readme.read_text(), tables.readme_table(merged), names)
        except (OSError, ValueError) as error:
            raise UserError(str(error)) from error
        readme.write_text(text)
        picture = report.write_picture(merged, readme.parent / "speed.svg")
        typer.echo(f"written: {readme}, {picture}")
