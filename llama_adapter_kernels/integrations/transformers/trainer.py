"""transformers' Trainer (and TRL's, which derive from it) with checkpoints that hold the adapter alone."""

import os
from typing import Any

from torch import nn

from llama_adapter_kernels.formats import native
from llama_adapter_kernels.integrations.choosing import attached_adapters, attachment_of
from llama_adapter_kernels.integrations.quantised import counts_as_adapted
from llama_adapter_kernels.integrations.transformers.methods import save_adapters


class AdapterTrainerMixin:
    """Resumes from checkpoints of a model with adapters, and trains those of a quantised one.

        class AdapterTrainer(lak.AdapterTrainerMixin, transformers.Trainer): ...

    Writing needs no mixin: `save_pretrained` of a model with adapters, which Trainer calls, writes the adapters alone.
    It does where PEFT has put LoRA around the model: PEFT writes what is PEFT's alone (as a `lak.ZeroGateConfig` is).
    """

    model: Any
    state: Any
    args: Any

    def __init__(self, *arguments: Any, **more: Any) -> None:
        """As the Trainer's.

        Raises:
            ValueError: no gradient gets through the weights of the model.
        """
        with counts_as_adapted(more.get("model", arguments[0] if arguments else None)):
            super().__init__(*arguments, **more)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Called by Trainer for every checkpoint and for `save_model`."""
        super()._save(output_dir, state_dict)  # type: ignore[misc]
        if _is_peft(self.model) and not _belongs_to_peft(self.model):
            folder = self.args.output_dir if output_dir is None else output_dir
            save_adapters(self.model, attachment_of(self.model)[1], folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Called by Trainer for `resume_from_checkpoint` and for `load_best_model_at_end`."""
        found = self.model if model is None else model
        if _is_peft(found):
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
        if not _belongs_to_peft(found):
            load_adapters(found, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if _is_peft(self.model):
            super()._load_best_model()  # type: ignore[misc]
        if not _belongs_to_peft(self.model):
            load_adapters(self.model, self.state.best_model_checkpoint)


def _is_peft(model: nn.Module) -> bool:
    return hasattr(model, "peft_config")


def _belongs_to_peft(model: nn.Module) -> bool:
    return bool(attached_adapters(model)) and attachment_of(model)[0].manager is not None


def load_adapters(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Fills the attached adapters from what `save_pretrained` of the model wrote into `folder`.

    Raises:
        ValueError: the model has no adapter, or the files are those of other adapters.
        OSError: there are no such files.
    """
    adapters = attached_adapters(model)
    if not adapters:
        raise ValueError("model: expected one with an adapter, it has none")
    for name, adapter in adapters.items():
        path = os.fspath(folder) if len(adapters) == 1 else os.path.join(folder, name)
        adapter.load_tensors(native.read(path), path)
