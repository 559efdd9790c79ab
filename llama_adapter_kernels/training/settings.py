"""The settings of a fine-tuning run. Defaults: the recipe of the LLaMA-Adapter paper (arXiv 2303.16199).

The fields of the three classes are the options of `llama-adapter finetune` and the keys of its --config: `option` says what
--help says about one. A field without it is for callers of Python alone.
"""

import math
from dataclasses import Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from llama_adapter_kernels.errors import UserError
from llama_adapter_kernels.models import check_dtype

DEFAULT_MAX_LENGTH = 512
SCHEDULED_BATCH_SIZE = 256  # the one that `base_learning_rate` is meant for


def _option(default: Any, text: str, **more: Any) -> Any:
    """A field that is an option of the command line.

    Args:
        text: what --help says.
        more: flag=True: there is no --no-...; name: where the option's is another than the field's.
    """
    return field(default=default, metadata={"help": text, **more})


@dataclass(frozen=True)
class Task:
    """What a run is about: where things come from and go to."""

    model: str = field(metadata={"help": "Base model: a local Hugging Face folder or a hub name."})
    data: list[Path] = field(
        metadata={"help": "JSON, JSONL, Parquet, a folder, or a data set on the hub; may be repeated. Alpaca rows, or "
                  "chats: messages, conversations."}
    )  # fmt: skip
    output: Path = field(metadata={"help": "Folder for the adapter, its checkpoints and logs."})
    eval_data: list[Path] | None = field(
        default=None,
        metadata={"help": "The same, held out: the best checkpoint by its loss is what is saved in the end."},
    )
    resume: bool = _option(False, "Go on with the run in OUTPUT from its last checkpoint.", flag=True)
    overwrite: bool = _option(False, "Replace the run in OUTPUT.", flag=True)
    dry_run: bool = _option(
        False, "Write nothing; say tokens, packing, memory and steps, and after one micro-batch the time.", flag=True
    )
    skip_bad_rows: bool = _option(False, "Leave out and count bad rows.", flag=True)


@dataclass(frozen=True)
class Settings:
    """Everything that decides the result of a run; a resumed run must have the same. Defaults: the paper's recipe."""

    prefix_length: int = _option(10, "Prompt tokens per layer.")
    layers: int | None = _option(None, "Topmost layers with prompts. (default: all but the lowest 2)")
    gate: str = _option("tanh", "tanh or identity.")
    gate_shape: str = _option("head", "head or scalar.")
    v2: bool = _option(False, "Tune bias, scale, norms and a LoRA besides (LLaMA-Adapter V2).", flag=True)
    lora_rank: int = _option(16, "Of the LoRA of --v2; 0: none.")
    epochs: int = _option(5, "Passes over the data.")
    warmup_epochs: float = _option(2.0, "Linear warm-up; at most 2/5 of the run.")
    max_steps: int | None = _option(None, "Stop after so many steps, whatever --epochs says.")
    batch_size: int = _option(64, "Examples per step, over all processes.")
    tokens_per_step: int | None = _option(None, "Or tokens per step, packed full.")
    base_learning_rate: float = _option(9e-3, "For 256 examples per step; scales with the examples of a step.")
    weight_decay: float = _option(0.02, "AdamW's.")
    betas: tuple[float, float] = _option((0.9, 0.95), "AdamW's.")
    max_gradient_norm: float = _option(0.0, "Clip the gradient's norm; 0: never.")
    max_length: int | None = _option(
        None, "Tokens; longer examples are truncated. (default: 512, at most the model's context)"
    )
    eval_fraction: float | None = _option(None, "Or hold out this part of --data.")
    eval_steps: int | None = _option(None, "Between held-out losses. (default: an epoch)")
    early_stopping: int | None = _option(None, "Stop after so many held-out losses without a new best.")
    template: str = _option("auto", "alpaca, chat (the tokenizer's), or auto: chat where rows are chats.")
    dtype: str = _option(
        "auto", "Of the base model's weights: float32, bfloat16 or float16; prompts and gates stay float32 (auto: "
        "float32 on a CPU, bfloat16 on a GPU)."
    )  # fmt: skip
    quantize: str | None = _option(
        None, "Quantise the frozen weights: bnb-8bit, bnb-4bit (nf4), torchao-int8 or torchao-int4."
    )
    autocast: bool = _option(
        False,
        "Keep the weights float32 and compute matrix products in bfloat16: twice the memory for weights.",
        flag=True,
    )
    seed: int = _option(0, "Of prompts and the order of examples.")
    init: str | None = _option(None, "Start from this saved adapter: the second of two stages.")
    image_encoder: str | None = _option(None, "Rows have an image; transformers folder or hub name.")
    audio_encoder: str | None = _option(None, "Rows have audio; the same, or log-mel.")
    conditioning: str = _option("queries", "queries, multi_scale, imagebind or mu_llama.")
    depths: int | None = _option(None, "Layers of the encoder that multi_scale and mu_llama read.")
    conditioning_sizes: tuple[tuple[str, int], ...] = ()  # depths, inner_size, blocks, heads where not as published
    fusion: str = _option("all", "all, or early: the image in the first adapted layer alone.")
    conditioning_rate: float = _option(1.0, "Learning rate of the conditioning over the adapter's.")

    @property
    def learning_rate(self) -> float:
        """For `batch_size` examples per step."""
        return self.learning_rate_for(self.batch_size)

    def learning_rate_for(self, examples_per_step: float) -> float:
        return self.base_learning_rate * examples_per_step / SCHEDULED_BATCH_SIZE


@dataclass(frozen=True)
class Execution:
    """How a run is carried out: changes speed, memory and what is written, the results by rounding only."""

    tokens_per_micro_batch: int | None = _option(
        None, "Tokens per process at a time. (default: what memory has room for)"
    )
    micro_batch_size: int | None = _option(None, "Or examples per process at a time, on average.")
    device: str = _option("auto", "cpu, cuda, cuda:N, mps or another device of torch; auto: a GPU where there is one.")
    on_cpu: bool = _option(False, "Short for --device cpu.", flag=True, name="cpu")
    memory: str = _option("auto", "low: compute activations again instead of keeping them; a third more time.")
    gradient_checkpointing: bool = _option(False, "The same as --memory low.", flag=True)
    shard: bool = _option(False, "Split the frozen model over the processes of torchrun (FSDP2).", flag=True)
    compile: bool = _option(False, "torch.compile the layers: a minute at first, faster steps after.", flag=True)
    liger: bool | None = _option(
        None, "liger-kernel's norms, rotations and SwiGLU. (default: on a GPU, where it is installed)"
    )
    save_steps: int | None = _option(None, "Between checkpoints. (default: an epoch, at most 500)")
    keep_checkpoints: int = _option(2, "Older ones are removed.")
    log_steps: int = _option(10, "Steps between logged losses.")
    report_to: str = _option("auto", "csv, tensorboard, wandb, with commas between; none; auto: csv, and tensorboard "
                             "where it is installed.")  # fmt: skip
    tensorboard: bool = _option(True, "Whether auto may mean tensorboard in --report-to.")
    push_to_hub: str | None = _option(None, "Upload the adapter to this repository (owner/name) of the hub in the end.")
    progress_bar: bool = _option(True, "Show one.")
    features: str | None = _option(None, "Folder that keeps the encoder's features.")

    @property
    def low_memory(self) -> bool:
        """Whether activations are computed again in the backward pass."""
        return self.memory == "low" or self.gradient_checkpointing

    @property
    def reports(self) -> tuple[str, ...]:
        """Where losses go, as far as it is said."""
        return tuple(filter(None, (name.strip() for name in self.report_to.split(","))))


QUANTISATIONS = ("bnb-8bit", "bnb-4bit", "torchao-int8", "torchao-int4")

# Ranges by name, ends included. The upper ends are far beyond any use; they keep a slip of the finger from an overflow.
_RANGES: dict[str, tuple[float, float]] = {
    "prefix_length": (1, 65_536), "layers": (1, 65_536), "lora_rank": (0, 65_536),
    "epochs": (1, 1_000_000), "warmup_epochs": (0, 1_000_000),
    "max_steps": (1, 10**12), "batch_size": (1, 10**9), "base_learning_rate": (0, 1e6), "weight_decay": (0, 1e6),
    "max_gradient_norm": (0, 1e12), "max_length": (8, 10**9), "seed": (0, 2**32 - 1), "micro_batch_size": (1, 10**9),
    "tokens_per_step": (8, 10**12), "tokens_per_micro_batch": (8, 10**12),
    "eval_steps": (1, 10**12), "early_stopping": (1, 10**9),
    "save_steps": (1, 10**12), "conditioning_rate": (0, 1e6), "depths": (1, 65_536),
    "keep_checkpoints": (1, 10**9), "log_steps": (1, 10**12),
}  # fmt: skip
_CHOICES = {
    "gate": ("tanh", "identity"),
    "gate_shape": ("head", "scalar"),
    "conditioning": ("multi_scale", "queries", "imagebind", "mu_llama"),
    "fusion": ("all", "early"),
    "template": ("auto", "alpaca", "chat"),
    "memory": ("auto", "low"),
}
REPORTS = ("csv", "tensorboard", "wandb")


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
    if settings.quantize is not None and settings.quantize not in QUANTISATIONS:
        raise UserError(f"--quantize: expected {' or '.join(QUANTISATIONS)}, got {settings.quantize!r}")
    if settings.quantize is not None and execution.shard:
        raise UserError("--quantize, --shard: expected one of them, got both")
    if settings.eval_fraction is not None and not 0 < settings.eval_fraction < 1:
        raise UserError(f"--eval-fraction: expected more than 0 and less than 1, got {settings.eval_fraction}")
    if not all(0 <= beta < 1 for beta in settings.betas):
        raise UserError(f"betas: expected two numbers from 0 to below 1, got {settings.betas}")
    if execution.micro_batch_size is not None and execution.tokens_per_micro_batch is not None:
        raise UserError("--micro-batch-size, --tokens-per-micro-batch: expected one of them, got both")
    if settings.image_encoder is not None and settings.audio_encoder is not None:
        raise UserError("--image-encoder, --audio-encoder: expected one of them, got both")
    if execution.on_cpu and execution.device not in ("auto", "cpu"):
        raise UserError(f"--cpu, --device {execution.device}: expected one of them, got both")
    if execution.compile and execution.shard:
        raise UserError("--compile, --shard: expected one of them, got both")
    if settings.autocast and settings.dtype not in ("auto", "float32"):
        raise UserError(f"--autocast: keeps the weights float32, expected no --dtype beside it, got {settings.dtype}")
    _check_reports(execution)
    check_dtype(settings.dtype, on_cpu=execution.on_cpu)


def _check_reports(execution: Execution) -> None:
    unknown = [name for name in execution.reports if name not in REPORTS]
    if execution.reports not in (("auto",), ("none",)) and (unknown or not execution.reports):
        got = repr(unknown[0] if unknown else execution.report_to)
        raise UserError(f"--report-to: expected {', '.join(REPORTS)} with commas between, none or auto; got {got}")


def options_of(kind: type) -> dict[str, Field[Any]]:
    """The fields of one of the classes that are options, by the option's name with underscores."""
    return {one.metadata.get("name", one.name): one for one in fields(kind) if "help" in one.metadata}


def option(name: str) -> str:
    """The command line's name of a setting."""
    return f"--{name.replace('_', '-')}"
