"""A model that DeepSpeed's ZeRO-3 keeps in pieces trains an adapter and saves it whole."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import llama_adapter_kernels as lak
from tests.support import zero3_runs
from tests.support.small_models import build

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
ROOT = Path(__file__).parents[2]


def test_two_processes_train_and_save_what_one_without_deepspeed_does(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.support.processes", "tests.support.zero3_runs", str(tmp_path)]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "LOCAL_SIZE": "2"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True) as process:
        try:
            process.wait(timeout=300)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0
    losses, trained = zero3_runs.alone()
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["losses"] == pytest.approx(losses, rel=1e-5)
    assert found["here"] * 2 == pytest.approx(found["whole"], rel=0.01)
    adapter = lak.load_adapter(build(), tmp_path / "adapter")
    for name, parameter in adapter.named_parameters():
        torch.testing.assert_close(parameter, trained[name], rtol=1e-4, atol=1e-4)
