"""The emulator's module, built once for all test workers."""

import fcntl
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

sys.path.insert(0, str(Path(__file__).parent))


def load_emulator() -> ModuleType:
    """Builds what changed (a worker waits for the other's build) and imports the module."""
    import building

    folder = building.ROOT / "build" / "emulator"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        path = building.build(folder)
    if "cuda_emulator" in sys.modules:
        return sys.modules["cuda_emulator"]
    spec = importlib.util.spec_from_file_location("cuda_emulator", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["cuda_emulator"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def emulator() -> ModuleType:
    return load_emulator()
