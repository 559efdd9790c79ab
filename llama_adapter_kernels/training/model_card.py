"""The README.md of a saved adapter: what it is, how it is used, what it was made from and with."""

import logging
from pathlib import Path
from typing import Any

from llama_adapter_kernels.training.checkpoints import write_whole
from llama_adapter_kernels.training.config_file import PACKAGES, effective
from llama_adapter_kernels.training.loop import Outcome
from llama_adapter_kernels.training.settings import Execution, Settings, Task, options_of
from llama_adapter_kernels.versions import versions

log = logging.getLogger(__name__)

CARD_FILE = "README.md"


def write_card(task: Task, settings: Settings, execution: Execution, outcome: Outcome) -> None:
    """Writes the card beside the adapter; where that fails, with a warning: the adapter matters more."""
    try:
        write_whole(task.output / CARD_FILE, model_card(task, settings, execution, outcome))
    except OSError as error:
        log.warning("%s: %s", task.output / CARD_FILE, error.strerror)


def model_card(task: Task, settings: Settings, execution: Execution, outcome: Outcome) -> str:
    """The text of the card. Paths of the machine that it was trained on stay out of it: files are published."""
    base = _public_name(task.model)
    decided = effective(task, settings, execution)
    shown = {name: decided[name] for name in options_of(Settings) if decided.get(name) not in (None, False, "auto")}
    for name in _not_used(settings):
        shown.pop(name, None)
    rows = "\n".join(f"| {name.replace('_', ' ')} | {_text(value)} |" for name, value in shown.items())
    made = ", ".join(f"{name} {version}" for name, version in versions(PACKAGES).items() if version)
    where = execution.push_to_hub or "FOLDER"
    command = f"llama-adapter chat --model {base} --adapter {where}"
    return f"""---
library_name: llama-adapter-kernels
{f"base_model: {base}" + chr(10) if "/" in base else ""}tags:
- llama-adapter
- zero-init-attention
---

# A LLaMA-Adapter for {base}

Prompts and gates of zero-init attention ([LLaMA-Adapter](https://arxiv.org/abs/2303.16199)) for the frozen model {base}:
{outcome.trainable_parameters:,} parameters beside its {outcome.total_parameters - outcome.trainable_parameters:,}. The \
base model is not part of it.

```python
import llama_adapter_kernels as lak
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{base}")
lak.load_adapter(model, "{where}")
```

or `{command}`.

## Training

{_data(task)}

{_losses(outcome)}

| setting | |
|---|---|
{rows}

Made with {made}.
"""


def _not_used(settings: Settings) -> tuple[str, ...]:
    """Settings that do not count beside the others; the adapter to begin with has a path here as its name."""
    senses = settings.image_encoder or settings.audio_encoder
    of_senses = () if senses else ("conditioning", "fusion", "conditioning_rate")
    return ("init", *of_senses, *(() if settings.v2 else ("lora_rank",)))


def _data(task: Task) -> str:
    names = ", ".join(_public_name(str(path)) for path in task.data)
    held_out = ", ".join(_public_name(str(path)) for path in task.eval_data or ())
    return f"On {names}" + (f", with {held_out} held out." if held_out else ".")


def _losses(outcome: Outcome) -> str:
    said = f"{outcome.step} steps"
    if outcome.losses:
        first, last = min(outcome.losses), max(outcome.losses)
        said += f"; loss per response token {outcome.losses[first]:.4f} at step {first}, "
        said += f"{outcome.losses[last]:.4f} at step {last}"
    if outcome.held_out_losses and outcome.best_step is not None:
        best = min(outcome.held_out_losses.values())
        said += f"; held-out loss {best:.4f} at its best, after step {outcome.best_step}, whose adapter this is"
    return f"{said}."


def _public_name(name: str) -> str:
    """A hub's name as it is; of a folder or file here, its own name."""
    path = Path(name)
    return path.resolve().name if path.exists() else name


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
