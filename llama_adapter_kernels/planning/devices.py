"""What devices can do: published peaks, and how much of them a training step gets.

The shares come from profiles of a step of LLaMA-7B's shape (benchmarks/results/gpu/step-7b-*.json), 8,000
tokens in sequences as long as Alpaca's, bfloat16. Matrix products reached 770 to 790 TFLOP/s (710 where kernels follow one
another so closely that the card draws all its power); elementwise kernels, of which many broadcast or convert, moved 2.0
TB/s on the H100 and 2.2 on the H200; the host took 50 microseconds for a kernel. For other GPUs such shares are assumed.
"""

from dataclasses import dataclass, replace

from llama_adapter_kernels.errors import UserError

_PRODUCTS, _COPY = 0.78, 0.73  # of the published peaks


@dataclass(frozen=True)
class Device:
    """Rates in FLOP/s (dense matrix products) and bytes/s, memory in bytes.

    Attributes:
        products: what matrix products of a step reach.
        copy: bytes read and written by a large copy.
        elementwise, attention: of the copy's rate, what such kernels reach.
        launch: seconds that the host takes for a kernel, Python and autograd included; the device waits where its kernels
            are shorter than that.
        measured: what of this was measured on such a device.
    """

    name: str
    products: float
    copy: float
    memory: float
    elementwise: float = 0.8
    attention: float = 0.3
    launch: float = 50e-6
    measured: str = ""


DEVICES = {
    device.name: device
    for device in (
        Device("h100", _PRODUCTS * 989e12, 2.43e12, 80e9, 0.82, 0.38, measured="in a step like this"),
        Device("h200", _PRODUCTS * 989e12, 3.58e12, 141e9, 0.62, 0.2, measured="in a step like this"),
        Device("a100", _PRODUCTS * 312e12, _COPY * 2.04e12, 80e9),
        Device("rtx4090", _PRODUCTS * 165e12, _COPY * 1.008e12, 24e9),
    )
}


def find_device(name: str, dtype: str) -> Device:
    """A device of the table, or "cpu": this one, measured in some seconds.

    Raises:
        UserError: an unknown name.
    """
    if name == "cpu":
        return measure_cpu(dtype)
    if name not in DEVICES:
        raise UserError(f"--device: expected one of {', '.join(DEVICES)} or cpu, got {name!r}")
    device = DEVICES[name]
    return replace(device, products=device.products / 16) if dtype == "float32" else device


def measure_cpu(dtype: str) -> Device:
    """This CPU: the rates of a matrix product in `dtype` and of a copy, and the memory that is free."""
    import psutil
    import torch

    from llama_adapter_kernels.bench import ceilings
    from llama_adapter_kernels.bench.measure import CpuClock

    found = ceilings.measure(torch.device("cpu"), [dtype], CpuClock())
    return Device(
        "cpu", found[f"gemm_{dtype}"], found["copy"], float(psutil.virtual_memory().available), elementwise=1.0,
        attention=1.0, launch=5e-6, measured="now",
    )  # fmt: skip
