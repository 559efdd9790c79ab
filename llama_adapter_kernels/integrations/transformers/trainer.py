"""transformers' Trainer (and TRL's, which derive from it) with checkpoints that hold the adapter alone."""

import os
from typing import Any

from torch import nn

from llama_adapter_kernels.formats import native
from llama_adapter_kernels.integrations.choosing import attached_adapters


class AdapterTrainerMixin:
    """Resumes from checkpoints of a model with adapters.

        class AdapterTrainer(lak.AdapterTrainerMixin, transformers.Trainer): ...

    Writing needs no mixin: `save_pretrained` of a model with adapters, which Trainer calls, writes the adapters alone.
    """

    model: Any
    state: Any

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Called by Trainer for `resume_from_checkpoint` and for `load_best_model_at_end`."""
        load_adapters(self.model if model is None else model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        load_adapters(self.model, self.state.best_model_checkpoint)


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
