"""The places of adapters in a model, as layers of PEFT: what PEFT asks and tells its layers reaches the attachment.

The modules are those of `attach_adapter`. Becoming instances of the classes here gives them PEFT's interface; parameters and
their names stay.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from llama_adapter_kernels.integrations.attachment import Attachment
from llama_adapter_kernels.integrations.slot import SLOT, Slot
from llama_adapter_kernels.integrations.target import execution_device
from llama_adapter_kernels.integrations.tuning import TUNING, TuningSlot

NO_MERGING = (
    "merging: a zero-gate adapter is no change of the model's weights, so there is nothing to merge it into; unload() gives "
    "the base model back, save_pretrained(folder) keeps the adapter"
)


class PeftLayer(BaseTunerLayer):
    """A place of adapters, by name its submodules.

    Attributes:
        attachment: what is attached to the whole model. All places of a model are told the same, so the first to be told
            tells it.
        home: the device of the module that the place belongs to.
    """

    adapter_layer_names = ("adapters",)
    attachment: Attachment
    home: torch.device
    _modules: dict[str, Any]

    @property
    def adapters(self) -> nn.ModuleDict:
        """The adapters here by name. A view: what is deleted there is deleted here."""
        view = nn.ModuleDict()
        view.__dict__["_modules"] = self._modules
        return view

    @property
    def weight(self) -> Any:
        """There is none: PEFT's layers show the weight of the linear that they wrap."""
        raise AttributeError("weight")

    @property
    def bias(self) -> Any:
        """There is none."""
        raise AttributeError("bias")

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Makes an adapter the one that runs and, without `inference_mode`, learns; an empty list: none.

        Raises:
            ValueError: there is more than one.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        if len(names) > 1:
            raise ValueError(
                f"adapter_name: expected one adapter at a time, got {', '.join(names)}; adapter_names=[...] of a forward "
                "pass gives every sequence of a batch its own"
            )
        super().set_adapter(names, inference_mode=inference_mode)
        if names and not inference_mode:
            self.attachment.thaw(names[0])
        self._tell()

    def enable_adapters(self, enabled: bool) -> None:
        """Switches between the adapter and the base model."""
        super().enable_adapters(enabled)
        self._tell()

    def join(self, names: list[str], enabled: bool) -> None:
        """For a place that is new in a model where `names` run: makes it agree."""
        self._active_adapter, self._disable_adapters = names, not enabled

    def _tell(self) -> None:
        names = self.active_adapters
        runs = bool(names) and not self.disable_adapters and names[0] in self.attachment.adapters
        name = names[0] if runs else None
        if self.attachment.active != name:
            self.attachment.active = name

    def delete_adapter(self, adapter_name: str) -> None:
        """Takes an adapter out of the whole model; where it was the one that runs, the first of the others takes over.

        Raises:
            ValueError: a forward pass with `adapter_names` uses it.
        """
        if adapter_name in self.attachment.adapters:
            self.attachment.remove(adapter_name)
        super().delete_adapter(adapter_name)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raises ValueError: there is nothing to merge into."""
        raise ValueError(NO_MERGING)

    def unmerge(self) -> None:
        """Nothing: no adapter is ever merged."""

    def _all_available_adapter_names(self) -> list[str]:
        return sorted(self.attachment.adapters)

    def _get_base_layer_device_and_dtype(self, base_layer: Any) -> tuple[torch.device, None]:
        return self.home, None  # the parameters are float32 whatever the model is


class PeftSlot(Slot, PeftLayer):
    """The prompts and gates of one attention module."""


class PeftTuningSlot(TuningSlot, PeftLayer):
    """What V2 tunes in one module."""


def peft_layers(model: nn.Module) -> Iterator[PeftLayer]:
    """The places of adapters in a model; those that are none of PEFT's layers yet become some."""
    for module in model.modules():
        for name, kind in ((SLOT, PeftSlot), (TUNING, PeftTuningSlot)):
            place: Any = module._modules.get(name)
            if place is not None:
                place.__class__ = kind
                place.home = execution_device(module)
                yield place
