"""The adapters of one attention module: a submodule of it that turns prompts into the prefix of a forward pass."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from llama_adapter_kernels.adapters.layer import AdapterLayer
from llama_adapter_kernels.adapters.selection import Entry, Selection
from llama_adapter_kernels.adapters.table import LayerPrefix, Prefix, join
from llama_adapter_kernels.integrations.architectures import Heads, Projection, legacy_rows
from llama_adapter_kernels.integrations.bypass import Bypass
from llama_adapter_kernels.ops.registration import accumulator_dtype

if TYPE_CHECKING:
    from llama_adapter_kernels.integrations.attachment import Attachment

SLOT = "zero_gate"  # the attribute of an attention module that holds its Slot
ROUTING = "zero_gate_routing"  # the keyword argument that carries the Routing of a forward pass
PREFIX = "zero_gate_prefix"  # the keyword argument that carries what gives the prefix in place of the module's Slot


class Routing:
    """What one forward pass knows about adapters; handed down to its attention modules as a keyword argument.

    So a pass that is computed again for its gradients (activation checkpointing) uses what it used the first time.

    Attributes:
        selection: which adapter each sequence uses.
        repeats: generation runs each sequence this many times in a row (beams).
        kept: prefixes that live as long as one generation, by layer number or whatever tells layers apart; None where
            nothing may be kept.
    """

    __slots__ = ("kept", "repeats", "selection")

    def __init__(
        self, selection: Selection, repeats: int = 1, kept: dict[Any, LayerPrefix | None] | None = None
    ) -> None:
        self.selection, self.repeats, self.kept = selection, repeats, kept


class GivesPrefix(Protocol):
    """Where an attention function gets the prefix of its layer."""

    def prefix(self, module: nn.Module, query: Tensor, routing: Routing | None, sequences: int) -> LayerPrefix | None:
        """See Slot.prefix."""
        ...


class Slot(nn.Module):
    """The AdapterLayers of one attention module by adapter name (its submodules).

    Args:
        number: of the layer in the model, from 0.
        heads: of the attention module.
        project: see Projection.
        attachment: of the model.
    """

    def __init__(self, number: int, heads: Heads, project: Projection, attachment: "Attachment") -> None:
        super().__init__()
        self.number, self.heads, self.project, self.attachment = number, heads, project, attachment

    def prefix(self, module: nn.Module, query: Tensor, routing: Routing | None, sequences: int) -> LayerPrefix | None:
        """What this layer adds to its attention in a forward pass; None for nothing.

        Args:
            module: the attention module.
            query: its dtype and device are those of the prefix.
            routing: of this forward pass; None where the model's code did not hand it down.
            sequences: in the batch, packed ones counted each.

        Raises:
            ValueError: the selection is for another number of sequences.
        """
        if routing is None:
            routing = self.attachment.running_routing()
        kept = routing.kept
        if kept is not None and self.number in kept:
            found = kept[self.number]
            if found is None or found.key.dtype == query.dtype:
                return found
        prefix: LayerPrefix | None = self(module, query, routing, sequences)
        if kept is not None:
            kept[self.number] = prefix
        return prefix

    def forward(self, module: nn.Module, query: Tensor, routing: Routing, sequences: int) -> LayerPrefix | None:
        """As `prefix`, computed."""
        selection = routing.selection
        if selection.whole:
            name = selection.names[0]
            if name is None or (layer := self.layer(name)) is None:
                return None
            return LayerPrefix(*self._one(module, query, name, layer))
        if sequences != len(selection.names) * routing.repeats:
            raise ValueError(
                f"adapters_per_sequence: expected one adapter for each of the {sequences // routing.repeats} sequences "
                f"of the batch, got {len(selection.names)}"
            )
        entries = [entry for entry in selection.entries if self.layer(entry[0]) is not None]
        if not entries:
            return None
        return join(self._groups(module, query, selection, entries), selection.index(entries, routing.repeats))

    def layer(self, name: str) -> AdapterLayer | None:
        """The layer of adapter `name`; None if that adapter leaves this layer alone."""
        found: AdapterLayer | None = self._modules.get(name)
        # A forward pass that began before the adapter was detached ends with it.
        return found if found is not None else self.attachment.detached_layer(name, self.number)

    def _one(self, module: nn.Module, query: Tensor, name: str, layer: AdapterLayer) -> Prefix:
        frozen = self._frozen(name, layer, query.dtype)
        if frozen is not None:
            return frozen
        prompts, gate = layer()
        key, value = self._project(module, prompts.to(query.dtype), layer)
        return self._freeze(name, query.dtype, Prefix(key, value, gate.to(accumulator_dtype(query.dtype))))

    def _groups(
        self, module: nn.Module, query: Tensor, selection: Selection, entries: Sequence[Entry]
    ) -> list[tuple[list[int], Prefix]]:
        """The prefixes of all entries, those of one length together: their prompts share one projection."""
        lengths: dict[tuple[Any, ...], list[tuple[list[int], Tensor, Tensor]]] = {}
        layers: dict[tuple[Any, ...], AdapterLayer] = {}
        groups: list[tuple[list[int], Prefix]] = []
        names: dict[str, list[int]] = {}
        for number, (name, row) in enumerate(entries):
            layer = self.layer(name)
            assert layer is not None
            if row is not None:
                names.setdefault(name, []).append(number)
            elif (frozen := self._frozen(name, layer, query.dtype)) is not None:
                groups.append(([number], frozen))
            else:
                layers[_form(layer)] = layer
                lengths.setdefault(_form(layer), []).append(([number], *layer()))
        for name, numbers in names.items():
            layer = self.layer(name)
            assert layer is not None
            rows = [row for row in (entries[number][1] for number in numbers) if row is not None]
            condition = selection.condition(name, rows, self.attachment.place(name, self.number))
            prompts, gate = layer(condition)
            layers[_form(layer)] = layer
            lengths.setdefault(_form(layer), []).append((numbers, prompts, gate.expand(len(numbers), -1)))
        for form, parts in lengths.items():
            prompts = torch.cat([part[1] for part in parts]) if len(parts) > 1 else parts[0][1]
            gates = torch.cat([part[2] for part in parts]) if len(parts) > 1 else parts[0][2]
            key, value = self._project(module, prompts.to(query.dtype), layers[form])
            prefix = Prefix(key, value, gates.to(accumulator_dtype(query.dtype)))
            numbers = [number for part in parts for number in part[0]]
            for i, number in enumerate(numbers):
                name, row = entries[number]
                if row is None:
                    self._freeze(name, query.dtype, Prefix(*(tensor[i : i + 1] for tensor in prefix)))
            groups.append((numbers, prefix))
        return groups

    def _project(self, module: nn.Module, prompts: Tensor, layer: AdapterLayer) -> tuple[Tensor, Tensor]:
        """Key and value of prompts that are used as those of `layer` are."""
        project = self.project if layer.rows == "own" else legacy_rows
        if layer.prompts_by == "tuned":
            return project(module, prompts, self.heads)
        with Bypass(self.attachment):
            return project(module, prompts, self.heads)

    def _frozen(self, name: str, layer: AdapterLayer, dtype: torch.dtype) -> Prefix | None:
        if name not in self.attachment.frozen_names or (torch.is_grad_enabled() and layer.prompt.requires_grad):
            return None
        return self.attachment.frozen.get(name, self.number, dtype)

    def _freeze(self, name: str, dtype: torch.dtype, prefix: Prefix) -> Prefix:
        """Keeps the prefix if its adapter was declared frozen. Returns it."""
        wanted = name in self.attachment.frozen_names and not torch.compiler.is_compiling()
        if wanted and not any(tensor.requires_grad for tensor in prefix):
            with torch.inference_mode(False):  # so that later calls may compute gradients beside it
                copies = Prefix(*(tensor.detach().clone() for tensor in prefix))
            self.attachment.frozen.keep(name, self.number, dtype, copies)
        return prefix


def _form(layer: AdapterLayer) -> tuple[Any, ...]:
    """Prompts of the same form go through one projection together."""
    return layer.prefix_length, layer.rows, layer.prompts_by
