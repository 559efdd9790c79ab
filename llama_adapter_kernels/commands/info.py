"""`llama-adapter info`: what is built and what is usable here."""

from typing import Annotated

import typer


def info(
    kernels: Annotated[
        bool, typer.Option("--kernels", help="List the CUDA kernels: tiles, threads, shared memory, registers.")
    ] = False,
) -> None:
    """Show versions, backends and why one is not usable, CPU instruction sets and GPU architectures."""
    import platform

    import torch

    import llama_adapter_kernels as lak
    from llama_adapter_kernels.ops import backends, cuda_library, registration

    python = platform.python_version()
    typer.echo(f"llama-adapter-kernels {lak.__version__}, torch {torch.__version__}, Python {python}")
    for package in ("transformers", "triton", "peft"):
        typer.echo(f"{package}: {_version(package) or 'not installed'}")
    for device, name in _devices():
        typer.echo(f"Backends on {name}:")
        for backend in backends.BACKENDS:
            reason = backends.unavailable_reason(backend, device)
            typer.echo(f"  {backend:<10} {'available' if reason is None else f'not available: {reason}'}")
    if registration.library_error is None:
        usable, used = registration.cpu_instruction_sets()
        typer.echo(f"CPU instruction sets: {', '.join(usable)}; in use: {used}; threads: {torch.get_num_threads()}")
    typer.echo(cuda_library.summary())
    if registration.cuda_library_error is not None and cuda_library.LIBRARY.exists():
        typer.echo(f"  not used: {registration.cuda_library_error}")
    for line in cuda_library.kernel_table() if kernels else []:
        typer.echo(line)


def _devices() -> list[tuple[str, str]]:
    """(device, what to call it): the CPU, and where torch is built with CUDA its cards, or "cuda" when it sees none."""
    import torch

    if torch.version.cuda is None:
        return [("cpu", "cpu")]
    cards = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"compute capability {properties.major}.{properties.minor}"
        cards.append((f"cuda:{index}", f"cuda:{index}, {properties.name}, {capability}"))
    return [("cpu", "cpu"), *(cards or [("cuda", "cuda")])]


def _version(package: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
