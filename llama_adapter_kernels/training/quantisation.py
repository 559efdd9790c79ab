"""Frozen weights that are quantised when they are loaded, or were when they were saved."""

import importlib.util
import os
from typing import Any

from llama_adapter_kernels.errors import UserError
from llama_adapter_kernels.models import load_config

_LIBRARIES = {"bnb": "bitsandbytes", "torchao": "torchao"}


def loading_options(model: str, quantize: str | None, dtype: Any, device: Any) -> dict[str, Any]:
    """What `load_model` is told besides: how the weights are quantised, and on a GPU that they go there at once.

    Args:
        quantize: one of settings.QUANTISATIONS; None: as the model's files are.
        dtype, device: of torch, what the model computes in and on.

    Raises:
        UserError: the library is not installed, or the files are quantised already.
    """
    found = getattr(load_config(model), "quantization_config", None)
    if quantize is None and found is None:
        return {}
    options: dict[str, Any] = {}
    if device.type != "cpu":  # without a number every process has its own
        number = int(os.environ.get("LOCAL_RANK", "0")) if device.index is None else device.index
        options = {"device_map": {"": f"{device.type}:{number}"}}
    if quantize is None:
        return options
    if found is not None:
        raise UserError(f"--quantize {quantize}: expected a model that is not quantised, {model} is")
    library = _LIBRARIES[quantize.partition("-")[0]]
    if importlib.util.find_spec(library) is None:
        raise UserError(f"--quantize {quantize}: {library} is not installed: pip install {library}")
    return {**options, "quantization_config": _configuration(quantize, dtype)}


def _configuration(quantize: str, dtype: Any) -> Any:
    import torch
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if quantize == "bnb-8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    if quantize == "bnb-4bit":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup

    if quantize == "torchao-int8":
        return TorchAoConfig(Int8WeightOnlyConfig())
    return TorchAoConfig(IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)))
