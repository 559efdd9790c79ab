"""The settings of a fine-tuning run. Defaults: the recipe of the LLaMA-Adapter paper (arXiv 2303.16199)."""

from dataclasses import asdict, dataclass

from llama_adapter_kernels.errors import UserError

SCHEDULED_BATCH_SIZE = 256  # the one that `base_learning_rate` is meant for


@dataclass(frozen=True)
class Settings:
    """Everything that decides the result of a run; a resumed run must have the same. Defaults: the paper's recipe."""

    prefix_length: int = 10
    layers: int | None = None  # topmost layers that get a prompt; None: all but the lowest two (LLaMA-7B: 30 of 32)
    gate: str = "tanh"
    gate_shape: str = "head"
    epochs: int = 5
    warmup_epochs: float = 2.0
    max_steps: int | None = None
    batch_size: int = 64  # examples per optimizer step, over all processes
    base_learning_rate: float = 9e-3  # for 256 examples per step; scaled with the batch size
    weight_decay: float = 0.02
    betas: tuple[float, float] = (0.9, 0.95)
    max_gradient_norm: float = 0.0  # 0: no clipping
    max_length: int = 512
    dtype: str = "auto"
    seed: int = 0

    @property
    def learning_rate(self) -> float:
        return self.base_learning_rate * self.batch_size / SCHEDULED_BATCH_SIZE


@dataclass(frozen=True)
class Execution:
    """How a run is carried out: changes speed, memory and what is written, the results by rounding only."""

    micro_batch_size: int = 8  # examples per process at a time, on average
    gradient_checkpointing: bool = False
    save_steps: int | None = None  # None: every epoch, at least every 500 steps
    keep_checkpoints: int = 2
    log_steps: int = 10
    tensorboard: bool = True
    progress_bar: bool = True
    on_cpu: bool = False


def check_settings(settings: Settings, execution: Execution) -> None:
    """Raises UserError for a number out of range."""
    least = {"prefix_length": 1, "epochs": 1, "batch_size": 1, "max_length": 8, "max_steps": 1, "layers": 1,
             "micro_batch_size": 1, "save_steps": 1, "keep_checkpoints": 1, "log_steps": 1, "warmup_epochs": 0,
             "base_learning_rate": 0, "weight_decay": 0, "max_gradient_norm": 0, "seed": 0}  # fmt: skip
    for name, value in (asdict(settings) | asdict(execution)).items():
        if value is not None and name in least and value < least[name]:
            raise UserError(f"--{name.replace('_', '-')}: expected at least {least[name]}, got {value}")
