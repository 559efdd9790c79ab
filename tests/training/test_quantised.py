"""Frozen models with quantised weights, in a process of its own: transformers imports their libraries where it can."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = Path(sys.prefix) / "quantised"  # where `make install` puts bitsandbytes, torchao and hqq


def test_quantised() -> None:
    path = [str(ROOT), os.environ.get("PYTHONPATH", ""), str(FOLDER)]
    missing = [
        name for name in ("bitsandbytes", "torchao", "hqq") if not (FOLDER / name).exists() and not find_spec(name)
    ]
    if missing:
        pytest.skip(
            f"{', '.join(missing)}: not installed, neither here nor in {FOLDER}, where `make install` puts them"
        )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/training/quantised_models.py"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}, cwd=ROOT, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
