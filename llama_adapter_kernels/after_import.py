"""Imports a module of this package right after another library, without importing that library."""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType


class _Finder(MetaPathFinder):
    """Finds a library where Python does, and lets its loader import `module` after it."""

    def __init__(self, library: str, module: str) -> None:
        self.library, self.module = library, module

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != self.library:
            return None
        spec = PathFinder.find_spec(name, path)
        if spec is None or spec.loader is None:
            return None
        load = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            load(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            import_module(self.module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def after_import(library: str, module: str) -> None:
    """Imports `module` now if `library` is imported already, else as soon as it is."""
    if library in sys.modules:
        import_module(module)
    else:
        sys.meta_path.insert(0, _Finder(library, module))
