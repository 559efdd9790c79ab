"""What --help shows is what was written: text in square brackets would be taken for markup and left out."""

import typer.main

from llama_adapter_kernels import cli


def test_no_help_text_is_taken_for_markup() -> None:
    group = typer.main.get_group(cli.app)
    texts = {
        f"{name} {option.name}": getattr(option, "help", None) or ""
        for name, command in group.commands.items()
        for option in command.params
    }
    assert len(texts) > 100
    assert not [name for name, text in texts.items() if "[" in text]
