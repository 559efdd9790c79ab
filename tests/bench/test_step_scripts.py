"""The scripts that time training steps run, on tiny models."""

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from llama_adapter_kernels.planning.devices import DEVICES
from llama_adapter_kernels.planning.shapes import BUILTIN

FOLDER = Path(__file__).parents[2] / "benchmarks" / "training"


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module(name)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_step_on_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Here on a CPU, where contestants of other kinds begin from the same prompts: their first losses agree."""
    pytest.importorskip("peft")
    module = script("step_on_gpu", monkeypatch)
    monkeypatch.setattr(module, "WARM_UP", 1)
    chosen = ("ours cpu", "ours cpu, checkpointing", "two SDPA calls, padded", "PEFT LoRA r8, padded")
    everyone = module.contestants
    monkeypatch.setattr(module, "contestants", lambda device: [one for one in everyone(device) if one.name in chosen])
    output = tmp_path / "step.json"
    monkeypatch.setattr(sys, "argv", ["", "--config", "tiny", "--device", "cpu", "--output", str(output)])
    module.main()
    found = json.loads(output.read_text())["contestants"]
    assert list(found) == list(chosen)
    losses = [entry["losses"][0] for entry in found.values()]
    assert losses == pytest.approx([losses[0]] * len(chosen), rel=1e-3)
    assert found["ours cpu"]["losses"] == pytest.approx(found["ours cpu, checkpointing"]["losses"], rel=1e-4)
    assert all(entry["tokens_per_second"] > 0 for entry in found.values())
    assert "Alpaca x 5" in capsys.readouterr().out


def test_plan_check(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    module = script("plan_check", monkeypatch)
    tiny = {
        **BUILTIN["smollm2-135m"],
        "hidden_size": 72,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "vocab_size": 128,
    }
    monkeypatch.setitem(BUILTIN, "smollm2-135m", tiny)
    monkeypatch.setattr(module, "measure_cpu", lambda dtype: DEVICES["a100"])
    monkeypatch.setattr(module.torch, "set_num_threads", lambda count: None)
    output = tmp_path / "check.json"
    options = ["--tokens", "600", "--threads", "1", "--dtype", "float32", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["", *options])
    module.main()
    found = json.loads(output.read_text())
    assert found["measured"]["flop"] == found["planned"]["flop"]
    assert found["measured"]["kept"] == pytest.approx(found["planned"]["kept"], rel=0.05)
    assert "step, seconds" in capsys.readouterr().out
