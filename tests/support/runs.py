"""What the tests of training share: short, quiet runs."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from llama_adapter_kernels.training.finetune import finetune
from llama_adapter_kernels.training.loop import Outcome
from llama_adapter_kernels.training.settings import Execution, Settings

QUIET = Execution(micro_batch_size=4, log_steps=1, save_steps=5, tensorboard=False, progress_bar=False, on_cpu=True)
SHORT = Settings(epochs=2, batch_size=8, base_learning_rate=0.3)


def run(model: Path, rows: Path, output: Path, settings: Settings = SHORT, **more: Any) -> Outcome:
    """Fine-tunes on one thread of the CPU."""
    return finetune(str(model), rows, output, settings, more.pop("execution", QUIET), **more)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The saved adapter in a folder."""
    [file] = folder.glob("*.safetensors")
    return load_file(file)
