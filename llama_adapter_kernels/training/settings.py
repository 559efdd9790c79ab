"""The settings of a fine-tuning run. Defaults: the recipe of the LLaMA-Adapter paper (arXiv 2303.16199)."""

import math
from dataclasses import asdict, dataclass

from llama_adapter_kernels.errors import UserError
from llama_adapter_kernels.models import check_dtype

DEFAULT_MAX_LENGTH = 512
SCHEDULED_BATCH_SIZE = 256  # the one that `base_learning_rate` is meant for


@dataclass(frozen=True)
class Settings:
    """Everything that decides the result of a run; a resumed run must have the same. Defaults: the paper's recipe."""

    prefix_length: int = 10
    layers: int | None = None  # topmost layers that get a prompt; None: all but the lowest two (LLaMA-7B: 30 of 32)
    gate: str = "tanh"
    gate_shape: str = "head"
    v2: bool = False  # LLaMA-Adapter V2: bias, scale, norms and a LoRA are tuned besides, see lak.Tuning
    lora_rank: int = 16  # of V2's LoRA; 0: none
    epochs: int = 5
    warmup_epochs: float = 2.0
    max_steps: int | None = None
    batch_size: int = 64  # examples per optimizer step, over all processes
    tokens_per_step: int | None = None  # or so many tokens per step at most; batch_size does not count then
    base_learning_rate: float = 9e-3  # for 256 examples per step; scaled with the batch size
    weight_decay: float = 0.02
    betas: tuple[float, float] = (0.9, 0.95)
    max_gradient_norm: float = 0.0  # 0: no clipping
    max_length: int | None = None  # tokens of an example; None: 512, or the model's context where that is shorter
    eval_fraction: float | None = None  # of the examples is held out
    eval_steps: int | None = None  # between measurements of the held-out loss; None: an epoch
    early_stopping: int | None = None  # stop after so many measurements without a new best
    template: str = "auto"  # how conversations become text: alpaca, chat (the tokenizer's); auto: chat for chats
    dtype: str = "auto"
    seed: int = 0
    init: str | None = None  # folder of a saved adapter to start from; None: new prompts, gates 0
    image_encoder: str | None = None  # rows have pictures, which this encoder sees; a folder or hub name
    audio_encoder: str | None = None  # rows have sounds
    conditioning: str = "queries"  # how features become prompts, see ConditioningConfig
    conditioning_sizes: tuple[tuple[str, int], ...] = ()  # its depths, inner_size, blocks, heads where not as published
    fusion: str = "all"
    conditioning_rate: float = 1.0  # its learning rate over the adapter's

    @property
    def learning_rate(self) -> float:
        """For `batch_size` examples per step."""
        return self.learning_rate_for(self.batch_size)

    def learning_rate_for(self, examples_per_step: float) -> float:
        return self.base_learning_rate * examples_per_step / SCHEDULED_BATCH_SIZE


@dataclass(frozen=True)
class Execution:
    """How a run is carried out: changes speed, memory and what is written, the results by rounding only."""

    tokens_per_micro_batch: int | None = None  # per process at a time, at most; None: what memory has room for
    micro_batch_size: int | None = None  # or examples per process at a time, on average
    gradient_checkpointing: bool = False
    shard: bool = False  # the frozen base model in pieces, one for each process
    save_steps: int | None = None  # None: every epoch, at least every 500 steps
    keep_checkpoints: int = 2
    log_steps: int = 10
    tensorboard: bool = True
    progress_bar: bool = True
    on_cpu: bool = False
    features: str | None = None  # folder where features of pictures and sounds are kept


# Ranges by name, ends included. The upper ends are far beyond any use; they keep a slip of the finger from an overflow.
_RANGES: dict[str, tuple[float, float]] = {
    "prefix_length": (1, 65_536), "layers": (1, 65_536), "lora_rank": (0, 65_536),
    "epochs": (1, 1_000_000), "warmup_epochs": (0, 1_000_000),
    "max_steps": (1, 10**12), "batch_size": (1, 10**9), "base_learning_rate": (0, 1e6), "weight_decay": (0, 1e6),
    "max_gradient_norm": (0, 1e12), "max_length": (8, 10**9), "seed": (0, 2**32 - 1), "micro_batch_size": (1, 10**9),
    "tokens_per_step": (8, 10**12), "tokens_per_micro_batch": (8, 10**12),
    "eval_steps": (1, 10**12), "early_stopping": (1, 10**9),
    "save_steps": (1, 10**12), "conditioning_rate": (0, 1e6), "keep_checkpoints": (1, 10**9), "log_steps": (1, 10**12),
}  # fmt: skip
_CHOICES = {
    "gate": ("tanh", "identity"),
    "gate_shape": ("head", "scalar"),
    "conditioning": ("multi_scale", "queries", "imagebind", "mu_llama"),
    "fusion": ("all", "early"),
    "template": ("auto", "alpaca", "chat"),
}


def check_settings(settings: Settings, execution: Execution) -> None:
    """Raises UserError for whatever is wrong with a setting by itself, whatever the model and the data are."""
    values = asdict(settings) | asdict(execution)
    for name, (least, most) in _RANGES.items():
        value = values[name]
        if value is not None and not (math.isfinite(value) and least <= value <= most):  # NaN compares false
            side = f"at most {most:,}" if value > most else f"at least {least}"
            if not math.isfinite(value):
                side = f"a number from {least} to {most:,}"
            raise UserError(f"{option(name)}: expected {side}, got {value}")
    for name, choices in _CHOICES.items():
        if values[name] not in choices:
            raise UserError(f"{option(name)}: expected {' or '.join(choices)}, got {values[name]!r}")
    if settings.eval_fraction is not None and not 0 < settings.eval_fraction < 1:
        raise UserError(f"--eval-fraction: expected more than 0 and less than 1, got {settings.eval_fraction}")
    if not all(0 <= beta < 1 for beta in settings.betas):
        raise UserError(f"betas: expected two numbers from 0 to below 1, got {settings.betas}")
    if execution.micro_batch_size is not None and execution.tokens_per_micro_batch is not None:
        raise UserError("--micro-batch-size, --tokens-per-micro-batch: expected one of them, got both")
    if settings.image_encoder is not None and settings.audio_encoder is not None:
        raise UserError("--image-encoder, --audio-encoder: expected one of them, got both")
    check_dtype(settings.dtype, on_cpu=execution.on_cpu)


def option(name: str) -> str:
    """The command line's name of a setting."""
    return f"--{name.replace('_', '-')}"
