"""Everything that needs a GPU, in one command and less than ten minutes.

    scripts/gpu_check.sh [--output FOLDER] [--only smoke,tests,sanitizer,bench,profile]

In this order: build for this card, a smoke test of each backend in a process of its own, the tests, compute-sanitizer,
races that record which backend is the faster one, profiles of the main kernels. A backend whose smoke test fails is left
out of the rest; every step has a time limit, and a failed one does not stop the next.

Logs go to FOLDER (gpu-check). benchmarks/results/gpu-check-CARD.json and .md say what passed, what was measured and what
was not run. For a machine with torch (CUDA), nvcc, CMake, Ninja, pybind11 and pytest; nothing is installed and no network
is used.
"""

import argparse
import csv
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gpu_check_races import races, table

ROOT = Path(__file__).parents[1].resolve()
FORMAT, VERSION = "llama-adapter-kernels GPU check", 1
PARTS = ("smoke", "tests", "sanitizer", "bench", "profile")
SANITIZED = "bfloat16 and (s17-17 or s65-64 or (decode and 64 and none))"

# name: (backend, kernels by regular expression), the first launch of each is profiled
PROFILES = {
    "forward_cuda": ("cuda", "forward_kernel"),
    "backward_cuda": ("cuda", "backward_keys_kernel"),
    "decode_cuda": ("cuda", "decode_kernel"),
    "forward_triton": ("triton", "forward_kernel"),
}
METRICS = {
    "microseconds": "gpu__time_duration.sum",
    "compute %": "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "memory %": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "tensor pipe %": "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active",
    "bank conflicts": "l1tex__data_bank_conflicts_pipe_lsu.sum",
    "registers": "launch__registers_per_thread",
}


@dataclass
class Step:
    """What became of one step."""

    name: str
    status: str = "not run"  # passed, failed, crashed, out of time, not run
    note: str = ""
    seconds: float = 0.0


@dataclass
class Check:
    """A run: its folder of logs, its deadline, what has happened so far."""

    folder: Path
    python: str
    deadline: float
    parts: frozenset[str] = frozenset(PARTS)
    steps: list[Step] = field(default_factory=list)
    machine: dict[str, str] = field(default_factory=dict)
    profiles: dict[str, dict[str, str]] = field(default_factory=dict)

    def step(self, name: str, limit: float, command: list[str], environment: dict[str, str] | None = None) -> Step:
        """Runs a command within its limit and the total; its output is in NAME.log."""
        found = Step(name)
        self.steps.append(found)
        left = self.deadline - time.monotonic()
        if left < 10:
            return self._say(found, "not run", "no time was left")
        begin = time.monotonic()
        environment = os.environ | {"PYTHONPATH": str(ROOT)} | (environment or {})
        with (self.folder / f"{name}.log").open("w") as log:
            try:
                # A session of its own, so that a time limit ends its children as well.
                process = subprocess.Popen(
                    command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
                )
            except OSError as error:
                return self._say(found, "failed", str(error))
            try:
                status = process.wait(min(limit, left))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                status = None
        found.seconds = round(time.monotonic() - begin, 1)
        last = next((line for line in reversed(self.log(name).splitlines()) if line.strip()), "")[:200]
        if status is None:
            return self._say(found, "out of time", f"after {min(limit, left):.0f} s; {last}")
        if status < 0:
            return self._say(found, "crashed", f"{signal.Signals(-status).name}; {last}")
        return self._say(found, "passed" if status == 0 else "failed", last)

    def leave_out(self, name: str, why: str) -> None:
        self.steps.append(Step(name))
        self._say(self.steps[-1], "not run", why)

    def tests(self, name: str, limit: float, arguments: list[str], prefix: list[str] | None = None) -> None:
        """pytest: a run in which every test was skipped has failed."""
        options = ["-q", "-m", "gpu", "-p", "no:cacheprovider"]
        if not prefix and importlib.util.find_spec("xdist"):
            options += ["-n", str(min(8, os.cpu_count() or 1))]  # Triton compiles on the CPU
        command = [*(prefix or []), self.python, "-m", "pytest", *options, *arguments]
        found = self.step(name, limit, command, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if prefix else None)
        if found.status == "passed" and not re.search(r"\d+ passed", self.log(name)):
            self._say(found, "failed", "no test ran")

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def _say(self, found: Step, status: str, note: str) -> Step:
        found.status, found.note = status, note
        print(f"{found.name}: {status}{f' ({note})' if note else ''}", flush=True)
        return found


def first_line(*command: str) -> str:
    try:
        text = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return text.splitlines()[-1].strip() if text else ""


def machine(python: str) -> dict[str, str]:
    """The card, its driver, the toolkit, torch and the commit."""
    card = first_line("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader").split(", ")
    torch = first_line(python, "-c", "import torch; c = torch.cuda.get_device_capability(); "
                       "print(torch.__version__, torch.version.cuda, '%d.%d' % c)").split()  # fmt: skip
    names = ("gpu", "driver", "memory", "torch", "torch_cuda", "compute_capability")
    found = dict(zip(names, [*(card + [""] * 3)[:3], *(torch + [""] * 3)[:3]], strict=True))
    return found | {"nvcc": first_line("nvcc", "--version"), "commit": first_line("git", "log", "-1", "--format=%h")}


def build(check: Check, carried: str | None) -> None:
    """The libraries for this card alone, into the package; or those of a folder."""
    package = ROOT / "llama_adapter_kernels"
    if carried:
        libraries = [str(path) for path in sorted(Path(carried).glob("libllama_adapter_kernels*.so"))]
        if Path(carried).resolve() != package:
            check.step("carry", 20, ["cp", *libraries, str(package)])
        return
    include = first_line(check.python, "-c", "from torch.utils.cpp_extension import include_paths as p; print(p()[0])")
    architecture = check.machine["compute_capability"].replace(".", "")
    folder = str(ROOT / "build" / "gpu-check")
    configure = ["cmake", "-S", str(ROOT), "-B", folder, "-G", "Ninja", f"-DLAK_TORCH_INCLUDE={include}", "-DLAK_CUDA=1",
                 f"-DLAK_CUDA_ARCHITECTURES={architecture}"]  # fmt: skip
    if check.step("configure", 60, configure).status == "passed":
        check.step("build", 200, ["cmake", "--build", folder])
        check.step("install", 20, ["cmake", "--install", folder, "--prefix", str(package)])


def profile(check: Check, name: str) -> None:
    backend, kernel = PROFILES[name]
    options = ["--csv", "--page", "raw", "--kernel-name", f"regex:{kernel}", "--launch-count", "1", "--metrics"]
    command = ["ncu", *options, ",".join(METRICS.values()), check.python, "scripts/gpu_smoke.py", backend, "--profile"]
    if check.step(f"profile_{name}", 45, command).status == "passed":
        rows = list(csv.reader(line for line in check.log(f"profile_{name}").splitlines() if line.startswith('"')))
        if len(rows) >= 3:  # names, units, values
            values = dict(zip(rows[0], rows[2], strict=False))
            check.profiles[name] = {label: values[metric] for label, metric in METRICS.items() if metric in values}


def run(check: Check, carried: str | None) -> None:
    python = check.python
    build(check, carried)
    smoke: dict[str, bool] = {}
    for backend in ("cuda", "triton"):
        found = check.step(f"smoke_{backend}", 60, [python, "scripts/gpu_smoke.py", backend])
        smoke[backend] = found.status == "passed"
    check.step("info", 30, [python, "-m", "llama_adapter_kernels", "info"])

    def only(backend: str, name: str, part: str, call: Callable[[], Any]) -> None:
        if part not in check.parts:
            check.leave_out(name, "not asked for")
        elif smoke[backend]:
            call()
        else:
            check.leave_out(name, f"smoke_{backend} did not pass")

    xml = "--junitxml={}/{}.xml"
    only("cuda", "tests_cuda", "tests", lambda: check.tests(
        "tests_cuda", 150, ["tests/cuda", "tests/cuda_torch", xml.format(check.folder, "tests_cuda")]))  # fmt: skip
    only("triton", "tests_triton", "tests", lambda: check.tests(
        "tests_triton", 90, ["tests/triton", xml.format(check.folder, "tests_triton")]))  # fmt: skip
    installed = (str(path) for path in Path("/usr/local").glob("cuda*/bin/compute-sanitizer"))
    sanitizer = shutil.which("compute-sanitizer") or next(installed, None)
    for tool in ("memcheck", "racecheck"):
        if sanitizer is None:
            check.leave_out(tool, "compute-sanitizer is not on this machine")
            continue
        # Without torch's caching allocator every tensor is an allocation of its own, whose ends the tool knows.
        prefix = [sanitizer, "--tool", tool, "--error-exitcode", "9"]
        only("cuda", tool, "sanitizer", lambda t=tool, p=prefix: check.tests(  # type: ignore[misc]
            t, 75, ["tests/cuda/test_cuda_on_gpu.py", "-k", SANITIZED], p))  # fmt: skip
    (check.folder / "bench.json").unlink(missing_ok=True)  # of an earlier check: the command never overwrites figures
    if "bench" not in check.parts:
        check.leave_out("bench", "not asked for")
    elif any(smoke.values()):
        options = ["--device", "cuda", "--quick", "--minutes", "2", "--output", str(check.folder / "bench.json")]
        options += ["--record-order"] if all(smoke.values()) else []
        check.step("bench", 150, [python, "-m", "llama_adapter_kernels", "bench", *options])
    else:
        check.leave_out("bench", "no backend passed its smoke test")
    for name, (backend, _) in PROFILES.items():
        if shutil.which("ncu") is None:
            check.leave_out(f"profile_{name}", "ncu is not on this machine")
        else:
            only(backend, f"profile_{name}", "profile", lambda n=name: profile(check, n))  # type: ignore[misc]


def markdown(check: Check, found: list[dict[str, Any]]) -> str:
    """The summary for people."""
    facts = ", ".join(value for value in check.machine.values() if value)
    lines = [
        f"# GPU check: {check.machine['gpu'] or 'no card'}",
        "",
        facts,
        "",
        "| step | result | seconds | |",
        "|---|---|---|---|",
    ]
    lines += [f"| {s.name} | {s.status} | {s.seconds:g} | {s.note.replace('|', '/')} |" for s in check.steps]
    lines += table(found)
    if check.profiles:
        lines += [
            "",
            "First launch, as ncu saw it:",
            "",
            f"| kernel | {' | '.join(METRICS)} |",
            "|---|" + "---|" * len(METRICS),
        ]
        lines += [f"| {n} | {' | '.join(p.get(m, '-') for m in METRICS)} |" for n, p in check.profiles.items()]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("gpu-check"), help="folder of the logs")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the summary")
    parser.add_argument("--seconds", type=float, default=540, help="for everything together")
    parser.add_argument(
        "--only", default=",".join(PARTS), help="which parts, of " + ",".join(PARTS) + "; smoke always runs"
    )
    parser.add_argument(
        "--carried",
        help="take libllama_adapter_kernels*.so from this folder (the package's own, if they are there) instead of building",
    )
    parser.add_argument("--python", default=sys.executable, help="what runs the steps")
    options = parser.parse_args()
    parts = frozenset(options.only.split(","))
    if unknown := parts - set(PARTS):
        parser.error(f"--only: {', '.join(sorted(unknown))} is none of {', '.join(PARTS)}")
    for folder in (options.output, options.results):
        folder.mkdir(parents=True, exist_ok=True)
    check = Check(options.output.resolve(), options.python, time.monotonic() + options.seconds, parts)
    check.machine = machine(options.python)
    print(json.dumps(check.machine, indent=1), flush=True)
    try:
        run(check, options.carried)
    finally:  # what there is gets written, also when somebody interrupts
        found = races(check.folder)
        name = "gpu-check-" + (re.sub(r"[^a-z0-9]+", "-", check.machine["gpu"].lower()).strip("-") or "none")
        document = {
            "format": FORMAT,
            "version": VERSION,
            "machine": check.machine,
            "steps": [asdict(step) for step in check.steps],
            "races_ms": found,
            "profiles": check.profiles,
        }
        (options.results / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")
        (options.results / f"{name}.md").write_text(markdown(check, found))
        print(f"written: {options.results / name}.json and .md", flush=True)
    passed = all(step.status == "passed" for step in check.steps if step.note != "not asked for")
    print("all passed" if passed else "NOT all passed")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
