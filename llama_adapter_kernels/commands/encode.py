"""`llama-adapter encode`."""

from pathlib import Path
from typing import Annotated

import typer

from llama_adapter_kernels.errors import UserError

Option = typer.Option


def encode(
    data: Annotated[Path, Option(help="Rows with image or audio, as for finetune.")],
    features: Annotated[Path, Option(help="Folder for the features; give it to finetune as --features.")],
    image_encoder: Annotated[str | None, Option(help="Transformers folder or hub name.")] = None,
    audio_encoder: Annotated[str | None, Option(help="The same, or log-mel.")] = None,
    conditioning: Annotated[
        str, Option(help="What will read them: queries, multi_scale, imagebind, mu_llama.")
    ] = "queries",
    depths: Annotated[int | None, Option(help="Layers of the encoder that multi_scale and mu_llama read.")] = None,
    skip_bad_rows: Annotated[bool, Option("--skip-bad-rows", help="Leave out and count bad rows.")] = False,
    cpu: Annotated[bool, Option("--cpu", help="Use no GPU.")] = False,
) -> None:
    """Run a frozen encoder over all images or sounds of a data file, once, so that training need not.

    What is in the folder already is not computed again, so an interrupted command goes on where it stopped.
    """
    if (image_encoder is None) == (audio_encoder is None):
        got = "none" if image_encoder is None else "both"
        raise UserError(f"--image-encoder, --audio-encoder: expected one of them, got {got}")
    import torch
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    from llama_adapter_kernels.adapters.conditioning import ConditioningConfig
    from llama_adapter_kernels.media.encoders import load_encoder
    from llama_adapter_kernels.media.features import FeatureStore
    from llama_adapter_kernels.training.data import read_rows

    modality, name = ("image", image_encoder) if image_encoder is not None else ("audio", audio_encoder)
    assert name is not None
    try:
        view = ConditioningConfig(conditioning, 1, 1).view
    except ValueError as error:
        raise UserError(f"--conditioning: {error}") from None
    rows = read_rows(data, skip_bad_rows=skip_bad_rows)
    paths = [(getattr(row, modality), f"{data}, row {n}") for n, row in enumerate(rows, 1) if getattr(row, modality)]
    if not paths:
        raise UserError(f'{data}: expected rows with "{modality}", none has it')
    encoder = load_encoder(name, modality, "cpu" if cpu or not torch.cuda.is_available() else "cuda")
    default = encoder.layers + 1 if conditioning == "mu_llama" else 1
    store = FeatureStore(encoder, view, depths or default, features)
    with Progress("encoding", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()) as bar:
        task = bar.add_task("", total=len(paths))
        new = store.encode_all(paths, lambda done: bar.update(task, completed=done))
    typer.echo(f"{len(paths)} rows, {new} files encoded; their features are in {features}")
