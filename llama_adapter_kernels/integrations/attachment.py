"""What is attached to one model: its adapters by name, which of them run, and what lives between forward passes."""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from llama_adapter_kernels.adapters.layer import AdapterLayer
from llama_adapter_kernels.adapters.selection import Selection
from llama_adapter_kernels.adapters.table import FrozenPrefixes
from llama_adapter_kernels.integrations import tuning
from llama_adapter_kernels.integrations.adapter import ZeroGateAdapter
from llama_adapter_kernels.integrations.generations import Generations
from llama_adapter_kernels.integrations.slot import Routing, Slot

ATTRIBUTE = "_zero_gate"  # of the module whose forward passes the adapters take part in
FROZEN_BYTES = 1 << 30  # of frozen prefixes, until Attachment.frozen.max_bytes says otherwise


class Override:
    """A selection in place of the active adapter, for one thread (or task) and model."""

    __slots__ = ("repeats", "selection")

    def __init__(self, selection: Selection) -> None:
        self.selection, self.repeats = selection, 1


# By id of the Attachment. A mapping is replaced, never changed: other threads and tasks have theirs.
_overrides: ContextVar[Mapping[int, Override]] = ContextVar("zero_gate_overrides", default={})  # noqa: B039
_running: ContextVar[Mapping[int, Routing]] = ContextVar("zero_gate_running", default={})  # noqa: B039


class Attachment:
    """The adapters of one model.

    Attributes:
        adapters: by name. Replaced, never changed in place, so that a forward pass in another thread sees a whole one.
        active: the name of the adapter of whole batches; None: the base model.
        frozen, frozen_names: prefixes that are kept until their adapter is thawed, and whose they are.
        slots: of the model's attention modules, by layer number.
        keywords: whether keyword arguments of the forward pass reach the attention modules.
        check: called with the module and the keyword arguments of every forward pass; raises where they cannot be right.
        manager: another library that keeps the books of the adapters (PEFT); None: this package's functions do.
        expects_training: the active adapter's parameters are meant to learn.
        tuned, layers: modules that adapters tune, and the model's layers as far as they have hooks for that.
        undo: what detaching the last adapter gives back.
    """

    def __init__(self, keywords: bool = True, check: Callable[[Any, dict[str, Any]], None] | None = None) -> None:
        self.adapters: dict[str, ZeroGateAdapter] = {}
        self.slots: dict[int, Slot] = {}
        self.keywords, self.check = keywords, check
        self.frozen = FrozenPrefixes(FROZEN_BYTES)
        self.frozen_names: frozenset[str] = frozenset()
        self.tuned: list[nn.Module] = []
        self.layers: list[nn.Module] = []
        self.undo: list[Callable[[], None]] = []
        self.manager: str | None = None
        self.expects_training = False
        self._active = Selection((None,), whole=True)
        self._start()

    def _start(self) -> None:
        self.lock = threading.RLock()
        self._in_use: dict[str, int] = {}
        self._detached: dict[str, ZeroGateAdapter] = {}
        self._generations = Generations()
        self.blocks = 0  # of adapters_per_sequence, in all threads
        # What compiled forward passes use: torch.compile reads no context variable, so it is that of all threads.
        self.innermost: Override | None = None
        self.bypassed = False  # while torch.compile traces: see bypass.Bypass

    def __getstate__(self) -> dict[str, Any]:
        passing = ("lock", "_in_use", "_detached", "_generations", "blocks", "innermost", "bypassed")
        return {name: value for name, value in self.__dict__.items() if name not in passing}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    @property
    def active(self) -> str | None:
        return self._active.names[0]

    @active.setter
    def active(self, name: str | None) -> None:
        self._active = Selection((name,), whole=True)

    # ---- adapters come and go

    def add(self, name: str, adapter: ZeroGateAdapter) -> None:
        """Puts the layers of a new adapter into the slots."""
        with self.lock:
            for number, layer in adapter.layers.items():
                slot = self.slots[int(number)]
                slot.add_module(name, layer.train(slot.training))
            self._detached.pop(name, None)
            self.adapters = {**self.adapters, name: adapter}
            adapter.name, adapter.attachment = name, self

    def remove(self, name: str) -> None:
        """Takes an adapter out. Forward passes that run at this moment end with it.

        Raises:
            ValueError: the adapter is unknown, or an `adapters_per_sequence` block uses it.
        """
        with self.lock:
            self.check_known(name)
            if self._in_use.get(name):
                raise ValueError(
                    f"adapter {name!r}: in use by an adapters_per_sequence block; detach it after the block"
                )
            self.thaw(name)
            self._detached[name] = self.adapters[name]
            self.adapters = {other: adapter for other, adapter in self.adapters.items() if other != name}
            for slot in self.slots.values():
                slot._modules.pop(name, None)
            tuning.disconnect(self, name)
            self._detached[name].attachment = None

    def check_known(self, *names: str | None) -> None:
        """Raises ValueError if a name is that of no adapter of this model."""
        for name in names:
            if name is not None and (not isinstance(name, str) or name not in self.adapters):
                known = ", ".join(map(repr, sorted(self.adapters)))
                raise ValueError(f"adapter {name!r}: unknown; this model has {known or 'none'}")

    def check_manager(self, manager: str | None, instead: str) -> None:
        """Raises ValueError if the adapters' books are kept elsewhere; `instead`: what does there what is asked for."""
        if self.manager is not None and manager != self.manager:
            raise ValueError(
                f"model: its adapters belong to {self.manager}, which must know of it: {instead} of its model"
            )
        if self.manager is None and manager is not None:
            raise ValueError(
                "model: expected one without adapters of attach_adapter; lak.detach_adapter(model) comes first"
            )

    def place(self, name: str, number: int) -> int:
        """Which of its adapter's layers the model's layer `number` is, from 0."""
        return list(self.adapters[name].layers).index(str(number))

    def detached_layer(self, name: str, number: int) -> AdapterLayer | None:
        """A layer of an adapter that was detached after a forward pass with it began."""
        adapter = self._detached.get(name)
        return None if adapter is None else adapter.layers._modules.get(str(number))

    def freeze(self, name: str) -> None:
        self.frozen_names |= {name}

    def thaw(self, name: str) -> None:
        self.frozen_names -= {name}
        self.frozen.forget(name)

    # ---- forward passes

    @contextmanager
    def override(self, selection: Selection) -> Iterator[None]:
        """Within the block this thread's forward passes use `selection`."""
        names = {name for name in selection.names if name is not None}
        with self.lock:
            self.check_known(*names)
            for name in names:
                self._in_use[name] = self._in_use.get(name, 0) + 1
        override = Override(selection)
        token = _overrides.set({**_overrides.get(), id(self): override})
        before, self.innermost = self.innermost, override
        try:
            yield
        finally:
            self.innermost = before
            _overrides.reset(token)
            with self.lock:
                for name in names:
                    self._in_use[name] -= 1

    def current_override(self) -> Override | None:
        """This thread's."""
        return _overrides.get().get(id(self))

    def selection(self) -> Selection:
        """What a forward pass that begins now in this thread uses."""
        override = self.innermost if torch.compiler.is_compiling() else self.current_override()
        return self._active if override is None else override.selection

    def routing(self, module: nn.Module, past: Any = None, tokens: int = 0) -> Routing:
        """For a forward pass that begins now.

        Args:
            module: whose forward pass it is.
            past: the cache of keys and values, if there is one.
            tokens: per sequence, without those in the cache.
        """
        compiling = torch.compiler.is_compiling()
        override = self.innermost if compiling else self.current_override()
        selection, repeats = (self._active, 1) if override is None else (override.selection, override.repeats)
        return Routing(selection, repeats, self._generations.prefixes(module, past, tokens, selection))

    def running_routing(self) -> Routing:
        """For attention modules that no keyword argument reaches."""
        if torch.compiler.is_compiling():
            return Routing(self._active)
        found = _running.get().get(id(self))
        return Routing(self._active) if found is None else found

    def set_running(self, routing: Routing | None) -> None:
        """Says what `running_routing` answers in this thread; None: the forward pass has ended."""
        others = {key: value for key, value in _running.get().items() if key != id(self)}
        _running.set(others if routing is None else {**others, id(self): routing})
