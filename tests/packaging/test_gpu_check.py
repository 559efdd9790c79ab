"""scripts/gpu_check.sh rehearsed: its own flow, with stand-ins for the card's tools and for what the steps run.

Nothing of this shows that a kernel works; it shows that a crash, a hang, a missing tool or a wrong result of one backend
costs that backend alone, and that the summary says so.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.emulator import ROOT

# Stands in for the interpreter that runs the steps: what each step's command would print and how it would end.
PYTHON = """#!/bin/bash
arguments="$*"
case "$arguments" in
  *"get_device_capability"*) echo "2.14.1 13.0 9.0" ;;
  *"include_paths"*) echo /include ;;
  *"gpu_smoke.py "*" --profile"*) echo profiled ;;
  *"gpu_smoke.py cuda"*) CUDA_SMOKE ;;
  *"gpu_smoke.py triton"*) TRITON_SMOKE ;;
  *" info"*) echo "llama-adapter-kernels" ;;
  *"tests/triton"*) echo "9 skipped in 1s" ;;
  *"-m pytest"*) echo "12 passed in 3s" ;;
  *" bench "*)
    echo "$arguments"
    while [[ $# -gt 0 && $1 != --output ]]; do shift; done
    echo '{"measurements": [BENCH]}' > "$2" ;;
  *) echo "unexpected: $arguments"; exit 3 ;;
esac
"""
TOOLS = {
    "nvidia-smi": 'echo "NVIDIA H100 80GB HBM3, 580.65.06, 81559 MiB"',
    "nvcc": 'echo "Build cuda_13.0"',
    "cmake": 'echo "$@"',
    "compute-sanitizer": 'shift 4; echo "======== COMPUTE-SANITIZER"; "$@"',
    "ncu": """echo '"ID","Kernel Name","gpu__time_duration.sum","launch__registers_per_thread"'
echo '"","","us","register/thread"'
echo '"0","forward_kernel","123.4","236"'
""",
}
TIMES = [
    {"case": "llama-7b", "mode": "forward", "dtype": "bfloat16", "peer": peer, "median": median}
    for peer, median in (
        ("ours-cuda", 0.001),
        ("ours-triton", 0.002),
        ("two-sdpa", 0.0035),
        ("eager", 0.1),
        ("sdpa", None),
    )
]


def rehearse(
    folder: Path, cuda: str = "echo right", triton: str = "echo right", tools: tuple[str, ...] = tuple(TOOLS),
    seconds: float = 100,
) -> tuple[int, dict[str, Any], str]:  # fmt: skip
    """(exit status, the JSON, the Markdown)"""
    tool_folder = folder / "bin"
    tool_folder.mkdir()
    text = PYTHON.replace("CUDA_SMOKE", cuda).replace("TRITON_SMOKE", triton)
    text = text.replace("BENCH", ", ".join(json.dumps(entry) for entry in TIMES))
    for name, content in ({"python": text} | {name: f"#!/bin/bash\n{TOOLS[name]}\n" for name in tools}).items():
        (tool_folder / name).write_text(content)
        (tool_folder / name).chmod(0o755)
    options = ["--output", folder / "logs", "--results", folder / "results", "--python", tool_folder / "python"]
    command = ["bash", ROOT / "scripts/gpu_check.sh", *options, "--seconds", seconds]
    environment = os.environ | {"PATH": f"{tool_folder}:/usr/bin:/bin", "PYTHON": sys.executable}
    run = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=120)
    results = sorted((folder / "results").iterdir())
    assert [path.suffix for path in results] == [".json", ".md"], run.stdout + run.stderr
    return run.returncode, json.loads(results[0].read_text()), results[1].read_text()


def statuses(document: dict[str, Any]) -> dict[str, str]:
    return {step["name"]: step["status"] for step in document["steps"]}


def test_all_steps_in_their_order(tmp_path: Path) -> None:
    status, document, text = rehearse(tmp_path)
    names = list(statuses(document))
    assert names[:5] == ["configure", "build", "install", "smoke_cuda", "smoke_triton"]
    assert names.index("smoke_triton") < names.index("tests_cuda") < names.index("memcheck") < names.index("bench")
    assert names[-1] == "profile_forward_triton"
    # Triton's tests were all skipped: that is no success.
    assert {name for name, result in statuses(document).items() if result != "passed"} == {"tests_triton"}
    assert status == 1
    assert document["machine"]["gpu"] == "NVIDIA H100 80GB HBM3"
    assert document["machine"]["compute_capability"] == "9.0"
    race = {"race": "llama-7b forward bfloat16", "ours-cuda": 1.0, "ours-triton": 2.0, "two-sdpa": 3.5}
    assert document["races_ms"] == [race]
    assert document["profiles"]["forward_cuda"] == {"microseconds": "123.4", "registers": "236"}
    assert "| tests_triton | failed |" in text and "no test ran" in text
    assert "| llama-7b forward bfloat16 | 1.0 | 2.0 | 3.5 | - |" in text
    assert "-DLAK_CUDA_ARCHITECTURES=90" in (tmp_path / "logs" / "configure.log").read_text()
    assert "--record-order" in (tmp_path / "logs" / "bench.log").read_text()
    assert (tmp_path / "results" / "gpu-check-nvidia-h100-80gb-hbm3.md").exists()


def test_a_crash_of_one_backend_costs_that_backend_alone(tmp_path: Path) -> None:
    _, document, text = rehearse(tmp_path, cuda="echo right so far; kill -SEGV $$")
    found = statuses(document)
    assert found["smoke_cuda"] == "crashed"
    assert "| smoke_cuda | crashed |" in text and "SIGSEGV; right so far" in text
    for name in ("tests_cuda", "memcheck", "racecheck", "profile_forward_cuda", "profile_decode_cuda"):
        assert found[name] == "not run", name
    assert found["smoke_triton"] == found["bench"] == found["profile_forward_triton"] == "passed"
    assert "--record-order" not in (tmp_path / "logs" / "bench.log").read_text()


@pytest.mark.parametrize("how", ["hang", "wrong"])
def test_nothing_works(tmp_path: Path, how: str) -> None:
    """A hang ends with the time there is; the rest is said not to have run."""
    command = "sleep 60" if how == "hang" else "echo 'AssertionError: output'; exit 1"
    status, document, text = rehearse(tmp_path, cuda=command, triton=command, seconds=14 if how == "hang" else 100)
    found = statuses(document)
    assert status == 1
    assert found["smoke_cuda"] == ("out of time" if how == "hang" else "failed")
    assert found["tests_cuda"] == found["bench"] == "not run"
    assert ("no time was left" in text) == (how == "hang")
    assert document["races_ms"] == []


def test_tools_that_are_missing_are_named(tmp_path: Path) -> None:
    _, document, text = rehearse(tmp_path, tools=("nvidia-smi", "cmake"))
    found = statuses(document)
    assert found["tests_cuda"] == "passed"
    assert found["profile_forward_cuda"] == "not run" and "ncu is not on this machine" in text
    if not any(Path("/usr/local").glob("cuda*/bin/compute-sanitizer")):
        assert found["memcheck"] == "not run" and "compute-sanitizer is not on this machine" in text
