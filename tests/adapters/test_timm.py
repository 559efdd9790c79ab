"""timm's models, in a process of their own: timm needs torchvision, and what works here of it others must not find."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = Path(sys.prefix) / "timm"  # where `make install` puts timm and the torchvision that it can import


def test_timm() -> None:
    if not FOLDER.exists() and find_spec("timm") is None:
        pytest.skip(f"timm is not installed, neither here nor in {FOLDER}, where `make install` puts it")
    path = os.pathsep.join([str(ROOT), str(FOLDER), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/adapters/timm_models.py",
         "tests/examples/test_examples.py::test_example[timm_vit]"],
        env=os.environ | {"PYTHONPATH": path}, cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
