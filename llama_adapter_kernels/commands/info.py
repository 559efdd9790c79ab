"""`llama-adapter info`: what is built and what is usable here."""

import typer


def info() -> None:
    """Show versions, backends and why one is not usable, CPU instruction sets and GPU kernels."""
    import platform

    import torch

    import llama_adapter_kernels as lak
    from llama_adapter_kernels.ops import backends, registration

    python = platform.python_version()
    typer.echo(f"llama-adapter-kernels {lak.__version__}, torch {torch.__version__}, Python {python}")
    for package in ("transformers", "triton", "peft"):
        typer.echo(f"{package}: {_version(package) or 'not installed'}")
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    for device in devices:
        typer.echo(f"Backends on {device}:")
        for backend in backends.BACKENDS:
            reason = backends.unavailable_reason(backend, device)
            typer.echo(f"  {backend:<10} {'available' if reason is None else f'not available: {reason}'}")
    if registration.library_error is None:
        usable, used = registration.cpu_instruction_sets()
        typer.echo(f"CPU instruction sets: {', '.join(usable)}; in use: {used}; threads: {torch.get_num_threads()}")
    for line in _cuda_lines():
        typer.echo(line)


def _cuda_lines() -> list[str]:
    """What the CUDA library says of its architectures and kernels, one line each; why not, where it is not there."""
    import torch

    from llama_adapter_kernels.ops import cuda_library, registration

    lines = (
        []
        if registration.cuda_library_error is None
        else [f"CUDA library: not used: {registration.cuda_library_error}"]
    )
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        lines.append(f"GPU {index}: {properties.name}, compute capability {properties.major}.{properties.minor}")
    return lines + cuda_library.report()


def _version(package: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
