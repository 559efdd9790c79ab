"""Registers the ops as soon as torch is there, without importing it.

A program that torch.export saved names its ops; loading it needs them registered, and nothing else of this package. So
`import llama_adapter_kernels` registers them, at once where torch is imported already, else when it is: the import order of
the two makes no difference, and the command line's help need not wait for torch.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_REGISTRATION = "llama_adapter_kernels.ops.registration"


class _Finder(MetaPathFinder):
    """Finds torch where Python does, and lets its loader import the registration after it."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "torch":
            return None
        spec = PathFinder.find_spec(name, path)
        if spec is None or spec.loader is None:
            return None
        load = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            load(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            import_module(_REGISTRATION)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def register() -> None:
    """Registers the ops now or after `import torch`."""
    if "torch" in sys.modules:
        import_module(_REGISTRATION)
    else:
        sys.meta_path.insert(0, _Finder())
