"""This package's adapter as PEFT configures its methods."""

from dataclasses import dataclass, field
from typing import Any

import peft
from peft import PeftConfig, PeftType

from llama_adapter_kernels.adapters.config import AdapterConfig


@dataclass
class ZeroGateConfig(PeftConfig):
    """An adapter for `peft.get_peft_model`: see AdapterConfig for what it looks like, PeftConfig for the other fields.

    Args:
        prefix_length: P, learned prompt tokens per layer.
        num_layers: adapt the last `num_layers` layers; None: all of them.
        layers: or exactly these (numbers from 0).
        gate: "tanh" or "identity".
        gate_shape: "head" or "scalar".
        tuning: a Tuning (LLaMA-Adapter V2), or its fields as a dictionary; None: nothing.
        modules_to_save: names of modules of the model that are trained and saved besides, such as a fresh head.

    Raises:
        ValueError: a field is of another type or out of range.
        ImportError: PEFT is older than 0.21.
    """

    prefix_length: int = field(default=10, metadata={"help": "Learned prompt tokens per layer"})
    num_layers: int | None = field(default=None, metadata={"help": "Adapt this many layers from the top; None: all"})
    layers: list[int] | None = field(default=None, metadata={"help": "Or exactly these layers, numbers from 0"})
    gate: str = field(default="tanh", metadata={"help": "tanh or identity"})
    gate_shape: str = field(default="head", metadata={"help": "A gate for each head, or scalar: one for each layer"})
    tuning: Any = field(default=None, metadata={"help": "What LLaMA-Adapter V2 tunes in the model besides"})
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules of the model that are trained and saved besides"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if "ZERO_GATE" not in PeftType.__members__:
            raise ImportError(f"peft: ZeroGateConfig needs release 0.21 or later, got {peft.__version__}")
        self.peft_type = PeftType("ZERO_GATE")
        config = self.adapter_config()
        self.tuning, self.layers = config.tuning, None if config.layers is None else list(config.layers)

    def adapter_config(self) -> AdapterConfig:
        """The same for `attach_adapter`."""
        layers: Any = self.layers
        return AdapterConfig(self.prefix_length, self.num_layers, layers, self.gate, self.gate_shape, self.tuning)
