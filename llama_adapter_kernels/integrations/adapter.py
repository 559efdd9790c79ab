"""The adapter of one model, as users hold it: its parameters, and the way to and from files."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llama_adapter_kernels import hub
from llama_adapter_kernels.adapters.config import AdapterConfig
from llama_adapter_kernels.adapters.layer import AdapterLayer
from llama_adapter_kernels.adapters.state import AdapterState
from llama_adapter_kernels.adapters.v2 import TunedPart
from llama_adapter_kernels.formats import native
from llama_adapter_kernels.formats.checking import check_state, check_tuned
from llama_adapter_kernels.integrations.gathering import gathered, is_writer

if TYPE_CHECKING:
    from llama_adapter_kernels.integrations.attachment import Attachment


class ZeroGateAdapter(nn.Module):
    """The parameters of one adapter of one model; what `attach_adapter` and `load_adapter` return.

    Args:
        config: see AdapterConfig.
        base: facts of the model that a saved adapter must find again: model_type, hidden_size, num_hidden_layers,
            num_attention_heads, num_key_value_heads, head_dim.
        devices: of every layer of the model; an adapted layer's parameters live where the layer does.
        tuned: what is tuned in the model's modules, by their path.

    Attributes:
        name: of the adapter in its model.
        layers: the AdapterLayers by layer number (as text), the same objects as in the model.
        leftover: what came with a loaded adapter and has no place in it; saved with it again.
        companions: functions that write what belongs to the adapter besides (a conditioning) into the same folder.
    """

    def __init__(
        self,
        config: AdapterConfig,
        base: dict[str, Any],
        devices: Sequence[torch.device],
        tuned: Mapping[str, TunedPart] | None = None,
    ) -> None:
        super().__init__()
        self.config, self.base, self.name = config, base, ""
        self.leftover: dict[str, Tensor] = {}
        self.companions: list[Callable[[Path], None]] = []
        self.attachment: Attachment | None = None
        numbers = config.layer_numbers(base["num_hidden_layers"])
        hidden_size, heads = base["hidden_size"], base["num_attention_heads"]
        self.layers = nn.ModuleDict({str(n): AdapterLayer(config, hidden_size, heads, devices[n]) for n in numbers})
        self.tuning = nn.Module()
        for path, part in (tuned or {}).items():
            _put(self.tuning, path, part)

    def parts(self) -> dict[str, nn.Module]:
        """The modules with parameters, the same objects as in the model, by their place in the adapter."""
        parts: dict[str, nn.Module] = {f"layers.{number}": layer for number, layer in self.layers.items()}
        parts |= {f"tuning.{path}": part for path, part in self.tuning.named_modules() if isinstance(part, TunedPart)}
        return parts

    def num_parameters(self) -> int:
        """All parameters of the adapter, counted."""
        return sum(parameter.numel() for parameter in self.parameters())

    def gates(self) -> dict[int, Tensor]:
        """What multiplies the prefix branch, by layer number: [heads] or [1], float32, detached."""
        return {int(n): layer.effective_gate().detach() for n, layer in self.layers.items()}

    def save_pretrained(self, path: str | os.PathLike[str], *, tensors: Mapping[str, Tensor] | None = None) -> None:
        """Writes the adapter into the folder `path`, in this package's own format (formats/native.py).

        Parameters that are sharded (FSDP2, ZeRO-3) or offloaded are gathered: all processes must call this then. In a
        process group rank 0 alone writes.

        Args:
            tensors: by name, as in an AdapterState, where the caller has gathered them already.

        Raises:
            OSError: the folder cannot be written; files that were there stay whole.
            ValueError: the parameters are not whole (in FSDP1: save inside `summon_full_params`), or not finite.
        """
        found = dict(tensors or {})
        for place, part in self.parts().items():
            for name, _ in part.named_parameters():
                if f"{place}.{name}" not in found:
                    found[f"{place}.{name}"] = gathered(part, name)
        found = {name: tensor.detach().cpu().contiguous() for name, tensor in found.items()}
        state = AdapterState(self.config, self.base, found, self.leftover)
        check_state(state, f"adapter {self.name!r}")
        if is_writer():
            native.write(path, state)
            for write in self.companions:
                write(Path(path))

    def push_to_hub(self, name: str) -> str:
        """Saves the adapter in a repository of the Hugging Face hub, with a card. Returns its address.

        Args:
            name: owner/name; created if it does not exist.

        Raises:
            UserError: nobody is logged in, the owner is somebody else, or there is no way to the hub.
            ValueError: as for `save_pretrained`.
        """
        hub.check_upload(name)
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            (Path(folder) / "README.md").write_text(hub.card(name, self.base["model_type"], self.num_parameters()))
            return hub.upload(Path(folder), name)

    def load_tensors(self, state: AdapterState, source: str) -> None:
        """Fills prompts and gates from `state`; `source` names it in messages.

        Raises:
            ValueError: names, shapes, dtypes or values are not those of this adapter; the message gives both.
        """
        check_state(replace(state, config=self.config, base=self.base), source)
        tuned = {path: part for path, part in self.parts().items() if isinstance(part, TunedPart)}
        shapes = {path: {name: tuple(value.shape) for name, value in p.named_parameters()} for path, p in tuned.items()}
        check_tuned(state, {path.removeprefix("tuning."): found for path, found in shapes.items()}, source)
        self.load_state_dict(state.tensors)
        self.leftover = state.leftover
        if self.attachment is not None and self.name in self.attachment.frozen_names:
            self.attachment.frozen.forget(self.name)

    def freeze_prefix(self) -> None:
        """Declares prompts, gates and the projections they go through final, for serving.

        Keys and values of the prompts are computed at their next use and kept, for every call that asks for no gradient
        of them, until `thaw_prefix`, `set_adapter` or `load_tensors`. What is changed meanwhile in any other way is not
        noticed. `lak.limit_frozen_prefixes` bounds the memory.

        Raises:
            ValueError: the adapter is attached to no model.
        """
        if self.attachment is None:
            raise ValueError(f"adapter {self.name!r}: expected one that is attached to a model, it is detached")
        self.requires_grad_(False)
        self.attachment.freeze(self.name)

    def thaw_prefix(self) -> None:
        """Takes `freeze_prefix` back; the parameters stay without gradients until `set_adapter`."""
        if self.attachment is not None:
            self.attachment.thaw(self.name)


def _put(root: nn.Module, path: str, part: nn.Module) -> None:
    """Makes `part` a submodule of `root` at a path of several names."""
    *between, last = path.split(".")
    for name in between:
        if name not in root._modules:
            root.add_module(name, nn.Module())
        root = root.get_submodule(name)
    root.add_module(last, part)
