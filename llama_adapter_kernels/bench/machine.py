"""What a time was measured on. Result files are published, so names of machines and paths stay out."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

import llama_adapter_kernels
from llama_adapter_kernels.ops import registration
from llama_adapter_kernels.versions import commit

_PACKAGES = ("torch", "triton", "transformers", "peft", "numpy")


def facts(device: torch.device) -> dict[str, Any]:
    """CPU, instruction set, threads, GPU, clocks of both, versions and commit."""
    found: dict[str, Any] = {
        "device": device.type,
        "cpu": cpu_name(),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "cpu_clock_mhz": cpu_clock(),
        "threads": torch.get_num_threads(),
        "torch_instruction_set": torch.backends.cpu.get_cpu_capability(),
        "our_instruction_set": registration.cpu_instruction_sets()[1] if registration.library_error is None else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "llama_adapter_kernels": llama_adapter_kernels.__version__,
        "commit": commit(),
    }
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    if device.type == "cuda":
        found |= _gpu_facts(device)
    return found


def cpu_name() -> str:
    return next(iter(_cpuinfo("model name")), "") or platform.processor() or platform.machine()


def cpu_clock() -> int | None:
    """MHz of the fastest core now, on virtual machines the nominal clock; None where the system does not say."""
    return max((round(float(value)) for value in _cpuinfo("cpu MHz")), default=None)


def _cpuinfo(field: str) -> list[str]:
    """The field's value for every core (Linux)."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return [line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == field]


def cache_bytes() -> int:
    """Size of the CPU's last-level cache; 32 MiB where the system does not say."""
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    found = [int(size[:-1]) * {"K": 1 << 10, "M": 1 << 20}[size[-1]] for size in sizes if size[-1:] in "KM" and size]
    return max(found, default=32 << 20)


def _gpu_facts(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    return {
        "gpu": properties.name,
        "gpu_compute_capability": f"{properties.major}.{properties.minor}",
        "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
        "gpu_processors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "gpu_clocks_mhz": gpu_clocks(device),
    }


def gpu_clocks(device: torch.device) -> dict[str, str] | None:
    """Clocks as nvidia-smi tells them (a query, nothing is set); None where it is not there."""
    if shutil.which("nvidia-smi") is None:
        return None
    fields = ("clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "driver_version")
    uuid = torch.cuda.get_device_properties(device).uuid
    run = subprocess.run(
        ["nvidia-smi", f"--id=GPU-{uuid}", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    values = [value.strip() for value in run.stdout.split(",")]
    return dict(zip(fields, values, strict=True)) if run.returncode == 0 and len(values) == len(fields) else None
