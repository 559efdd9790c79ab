"""The emulator of tests/emulator, shared."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def emulator() -> ModuleType:
    path = Path(__file__).parent.parent / "emulator" / "conftest.py"
    spec = importlib.util.spec_from_file_location("emulator_conftest", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.load_emulator()
