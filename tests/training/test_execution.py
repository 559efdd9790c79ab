"""How a run is carried out: its device, where losses go, what is uploaded, the model card, parts by liger-kernel."""

import importlib.machinery
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from typer.testing import CliRunner

import llama_adapter_kernels as lak
from llama_adapter_kernels import devices, hub
from llama_adapter_kernels.cli import app
from llama_adapter_kernels.errors import UserError
from llama_adapter_kernels.models import load_model
from llama_adapter_kernels.training import finetune as fine_tuning
from llama_adapter_kernels.training import reporters
from llama_adapter_kernels.training.fused_parts import fuse_parts, wants_liger
from llama_adapter_kernels.training.loss import response_loss
from llama_adapter_kernels.training.packing import pack
from llama_adapter_kernels.training.settings import Execution, Settings
from llama_adapter_kernels.training.tokens import Example
from llama_adapter_kernels.training.trainer import Arguments
from tests.support.runs import QUIET, SHORT, run

ONE_STEP = replace(SHORT, max_steps=1)


# ---- devices ----


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("gpu", "--device: expected auto, cpu, cuda, cuda:N, mps or another device that torch knows, got 'gpu'"),
        ("cuda:x", "got 'cuda:x'"),
        ("meta", "--device meta: torch .* sees no meta device here"),
        ("cuda", "--device cuda: torch .* sees no cuda device here; cpu always works"),
        ("mps", "--device mps: torch .* sees no mps device here"),
    ],
)
def test_devices_that_are_not_here(
    tiny_model: Path, rows_file: Path, tmp_path: Path, name: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=said):
        run(tiny_model, rows_file, tmp_path / "run", execution=replace(QUIET, on_cpu=False, device=name))
    assert not (tmp_path / "run").exists()


def test_devices_that_are_here(monkeypatch: pytest.MonkeyPatch) -> None:
    assert devices.pick_device("cpu:0") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert devices.pick_device("auto").type == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert devices.pick_device("auto") == torch.device("cuda")
    assert devices.pick_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(UserError, match="cuda:2: expected one of the devices that are here, cuda:0, cuda:1"):
        devices.pick_device("cuda:2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert devices.pick_device("cuda") == torch.device("cuda")
    with pytest.raises(UserError, match="cuda:1: expected cuda without a number"):
        devices.pick_device("cuda:1")


@pytest.mark.parametrize("command", ["generate", "evaluate"])
def test_every_command_takes_a_device(command: str, tiny_model: Path, rows_file: Path, tmp_path: Path) -> None:
    where = {
        "generate": ["--instruction", "x"],
        "evaluate": ["held_out", "--data", str(rows_file), "--output", str(tmp_path / "out")],
    }[command]
    for device, said in (("gpu", "expected auto, cpu"), ("cuda:99", "--cpu, --device cuda:99: expected one of them")):
        more = ["--cpu"] if device != "gpu" else []
        result = CliRunner().invoke(app, [command, "--model", str(tiny_model), *where, "--device", device, *more])
        assert (result.exit_code, "Traceback" in result.output) == (2, False)
        assert said in result.stderr


def test_one_process_runs_where_it_is_told_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    arguments = Arguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    arguments.place_on(torch.device("cpu"))
    assert (arguments.device.type, arguments.n_gpu) == ("cpu", 0)
    arguments.place_on(torch.device("cuda", 1))
    assert arguments.device == arguments.distributed_state.device == chosen[0] == torch.device("cuda", 1)
    arguments.place_on(torch.device("mps"))
    assert arguments.device == torch.device("mps")
    arguments.place_on(torch.device("cuda"))
    assert arguments.device == torch.device("cuda", 0)
    AcceleratorState._reset_state(reset_partial_state=True)


def test_two_words_for_the_device(tiny_model: Path, rows_file: Path, tmp_path: Path) -> None:
    assert run(tiny_model, rows_file, tmp_path / "run", ONE_STEP, execution=replace(QUIET, on_cpu=False, device="cpu"))
    with pytest.raises(UserError, match="--memory: expected auto or low, got 'some'"):
        run(tiny_model, rows_file, tmp_path / "other", execution=replace(QUIET, memory="some"))


# ---- reports ----


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **content: Any) -> ModuleType:
    """A module of that name as if it were installed."""
    module = ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    for key, value in content.items():
        setattr(module, key, value)
    monkeypatch.setitem(sys.modules, name, module)
    return module


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ("csv,paper", "--report-to: expected csv, tensorboard, wandb with commas between, none or auto; got 'paper'"),
        ("auto,csv", "got 'auto'"),
        ("", "got ''"),
        ("wandb", "--report-to wandb: wandb is not installed: pip install wandb, or leave it out"),
    ],
)
def test_reports_that_go_nowhere(
    tiny_model: Path, rows_file: Path, tmp_path: Path, names: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=said):
        run(tiny_model, rows_file, tmp_path / "run", execution=replace(QUIET, report_to=names))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("names", "files"),
    [("none", set()), ("csv", {"training_log.csv"}), ("tensorboard, csv", {"training_log.csv", "tensorboard"})],
)
def test_reports_go_where_they_are_asked_to(
    tiny_model: Path, rows_file: Path, tmp_path: Path, names: str, files: set[str]
) -> None:
    if "tensorboard" in names:
        pytest.importorskip("tensorboard")
    outcome = run(tiny_model, rows_file, tmp_path / "run", ONE_STEP, execution=replace(QUIET, report_to=names))
    assert outcome.losses
    assert {path.name for path in (tmp_path / "run").iterdir()} & {"training_log.csv", "tensorboard"} == files


def test_without_tensorboard_there_is_one_word_about_it(
    tiny_model: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.setattr(reporters, "_installed", lambda name: name != "tensorboard")
    with caplog.at_level("INFO", logger="llama_adapter_kernels"):
        run(tiny_model, rows_file, tmp_path / "run", ONE_STEP, execution=replace(QUIET, tensorboard=True))
    assert caplog.text.count("tensorboard is not installed: losses go to training_log.csv alone") == 1
    assert not (tmp_path / "run" / "tensorboard").exists()
    with pytest.raises(UserError, match="--report-to tensorboard: tensorboard is not installed: pip install tensorb"):
        run(tiny_model, rows_file, tmp_path / "other", execution=replace(QUIET, report_to="tensorboard"))


class Recorded:
    """What a stand-in for wandb was told."""

    def __init__(self) -> None:
        self.begun: dict[str, Any] = {}
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.finished = self.broken = False

    def init(self, **options: Any) -> "Recorded":
        self.begun = options
        return self

    def log(self, values: dict[str, Any], step: int) -> None:
        if self.broken:
            raise ConnectionError("no network")
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished = True


def test_wandb_is_told_what_the_log_says(
    tiny_model: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = Recorded()
    stand_in(monkeypatch, "wandb", init=told.init)
    settings = replace(SHORT, max_steps=2, eval_fraction=0.2)
    outcome = run(tiny_model, rows_file, tmp_path / "run", settings, execution=replace(QUIET, report_to="wandb"))
    assert {step: values["loss"] for step, values in told.logged if "loss" in values} == outcome.losses
    assert any("eval_loss" in values for _, values in told.logged)
    assert (told.begun["group"], told.begun["config"]["epochs"], told.finished) == ("run", SHORT.epochs, True)


def test_wandb_without_a_network_is_not_the_end(
    tiny_model: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    told = Recorded()
    told.broken = True
    stand_in(monkeypatch, "wandb", init=told.init)
    assert run(tiny_model, rows_file, tmp_path / "run", execution=replace(QUIET, report_to="wandb")).finished
    assert caplog.text.count("wandb: no network; nothing more is sent there") == 1


# ---- the hub ----


class Hub:
    """A stand-in for huggingface_hub.HfApi."""

    uploaded: dict[str, Any] = {}  # noqa: RUF012
    error: BaseException | None = None

    def whoami(self) -> dict[str, Any]:
        if self.error is not None:
            raise self.error
        return {"name": "me", "orgs": [{"name": "us"}]}

    def create_repo(self, name: str, exist_ok: bool) -> str:
        return f"https://hub/{name}"

    def upload_folder(self, *, folder_path: Path, **options: Any) -> None:
        files = {path.name for path in Path(folder_path).iterdir()}
        type(self).uploaded = {"files": files, **options}
        if self.error is not None:
            raise self.error


@pytest.fixture
def fake_hub(monkeypatch: pytest.MonkeyPatch) -> type[Hub]:
    import huggingface_hub

    class Fresh(Hub):
        pass

    monkeypatch.setattr(huggingface_hub, "HfApi", Fresh)
    monkeypatch.setattr(hub, "check_reachable", lambda: None)
    return Fresh


def test_an_upload_takes_the_adapter_and_its_card(
    tiny_model: Path, rows_file: Path, tmp_path: Path, fake_hub: type[Hub]
) -> None:
    execution = replace(QUIET, push_to_hub="us/an-adapter")
    run(tiny_model, rows_file, tmp_path / "run", ONE_STEP, execution=execution)
    assert fake_hub.uploaded["repo_id"] == "us/an-adapter"
    from huggingface_hub.utils import filter_repo_objects

    ignored = fake_hub.uploaded["ignore_patterns"]
    sent = set(filter_repo_objects(sorted(fake_hub.uploaded["files"]), ignore_patterns=ignored))
    assert sent == {"adapter.safetensors", "zero_gate_adapter.json", "README.md", "config.yaml"}


def test_an_upload_that_fails_says_where_the_adapter_is(
    tiny_model: Path, rows_file: Path, tmp_path: Path, fake_hub: type[Hub], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake_hub, "whoami", lambda self: {"name": "me"})
    monkeypatch.setattr(fake_hub, "error", ConnectionError("gone"))
    with pytest.raises(
        UserError, match=r"--push-to-hub me/a: the hub cannot be reached; the adapter is saved in .*run"
    ):
        run(tiny_model, rows_file, tmp_path / "run", ONE_STEP, execution=replace(QUIET, push_to_hub="me/a"))
    assert (tmp_path / "run" / "adapter.safetensors").exists()


def test_an_upload_that_cannot_be_is_refused_before_training(
    tiny_model: Path, rows_file: Path, tmp_path: Path, fake_hub: type[Hub], monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub.errors import LocalTokenNotFoundError

    monkeypatch.setattr(fine_tuning, "load_model", lambda *_: pytest.fail("loaded"))

    def refused(name: str, said: str) -> None:
        with pytest.raises(UserError, match=said):
            run(tiny_model, rows_file, tmp_path / "run", execution=replace(QUIET, push_to_hub=name))
        assert not (tmp_path / "run").exists()

    refused("adapter", "--push-to-hub: expected owner/name, got 'adapter'")
    refused("them/a", "expected a repository of me or us, got one of them")
    monkeypatch.setattr(fake_hub, "error", LocalTokenNotFoundError("long words"))
    refused("me/a", "--push-to-hub me/a: nobody is logged in to the hub: `hf auth login`, or a token in HF_TOKEN$")
    monkeypatch.undo()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refused("me/a", "--push-to-hub me/a: HF_HUB_OFFLINE is set$")


def test_an_adapter_goes_to_the_hub_and_comes_back(
    tiny_model: Path, tmp_path: Path, fake_hub: type[Hub], monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    network = load_model(str(tiny_model), torch.float32)
    adapter = lak.attach_adapter(network, lak.AdapterConfig(num_layers=2))
    assert adapter.push_to_hub("me/mine") == "https://hub/me/mine"
    assert fake_hub.uploaded["files"] == {"adapter.safetensors", "zero_gate_adapter.json", "README.md"}
    with pytest.raises(UserError, match="push_to_hub: expected owner/name, got 'mine'"):
        adapter.push_to_hub("mine")
    adapter.save_pretrained(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(tmp_path))
    again = lak.load_adapter(load_model(str(tiny_model), torch.float32), "me/mine")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), adapter.parameters(), strict=True))
    monkeypatch.undo()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match="me/yours: no such folder, and not from the hub either: HF_HUB_OFFL"):
        lak.load_adapter(load_model(str(tiny_model), torch.float32), "me/yours")


def test_names_on_a_hub_that_is_not_there(
    tiny_model: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="--model some/model: no such folder, and not from the hub either: HF_HUB_OFF"):
        run(Path("some/model"), rows_file, tmp_path / "run")
    with pytest.raises(
        UserError, match="--data some/data: no such file or folder, and not from the hub either: HF_HUB"
    ):
        run(tiny_model, Path("some/data"), tmp_path / "run")
    with pytest.raises(UserError, match=r"^some/data.json: No such file"):
        run(tiny_model, Path("some/data.json"), tmp_path / "run")


def test_a_host_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    monkeypatch.setattr(hub.urllib.request, "getproxies", dict)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"the hub \(127.0.0.1\) cannot be reached: Connection refused"):
        hub.check_reachable()


def test_a_data_set_of_the_hub(
    tiny_model: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked: list[Any] = []

    def download(name: str, **options: Any) -> str:
        asked.append((name, options["repo_type"], options["allow_patterns"]))
        return str(rows_file.parent)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(hub, "check_reachable", lambda: None)
    assert run(tiny_model, Path("some/data"), tmp_path / "run", ONE_STEP).finished
    assert asked == [("some/data", "dataset", ["*.json", "*.jsonl", "*.parquet"])]
    assert "On some/data." in (tmp_path / "run" / "README.md").read_text()


# ---- the card ----


def test_the_card_says_what_the_adapter_is(tiny_model: Path, rows_file: Path, tmp_path: Path) -> None:
    settings = replace(SHORT, max_steps=3, eval_fraction=0.2, gate="identity")
    outcome = run(tiny_model, rows_file, tmp_path / "run", settings)
    text = (tmp_path / "run" / "README.md").read_text()
    _, head, body = text.split("---\n", 2)
    assert yaml.safe_load(head)["tags"] == ["llama-adapter", "zero-init-attention"]
    assert f"{outcome.trainable_parameters:,} parameters" in body
    assert f"{outcome.losses[3]:.4f} at step 3" in body
    assert f"held-out loss {min(outcome.held_out_losses.values()):.4f}" in body
    assert "| gate | identity |" in body
    assert str(tmp_path) not in text
    assert str(rows_file.parent) not in text
    assert not json.loads((tmp_path / "run" / "run.json").read_text())["settings"]["v2"]
    assert "lora rank" not in body


# ---- liger-kernel ----


def liger(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A stand-in that notes what it is asked to do."""
    calls: list[Any] = []
    patch = stand_in(
        monkeypatch,
        "liger_kernel.transformers.monkey_patch",
        MODEL_TYPE_TO_APPLY_LIGER_FN={"llama": None},
        _apply_liger_kernel_to_instance=lambda **options: calls.append(options),
    )
    stand_in(monkeypatch, "liger_kernel.transformers", monkey_patch=patch)
    stand_in(monkeypatch, "liger_kernel")
    return calls


def test_liger_is_for_gpus_that_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not wants_liger(Settings(), Execution(), gpu)
    with pytest.raises(UserError, match=r"--liger: liger-kernel is not installed: pip install .*\[gpu\]"):
        wants_liger(Settings(), Execution(liger=True), gpu)
    monkeypatch.undo()
    liger(monkeypatch)
    assert wants_liger(Settings(), Execution(), gpu)
    assert wants_liger(Settings(), Execution(liger=True), gpu)
    assert not wants_liger(Settings(), Execution(liger=False), gpu)
    assert not wants_liger(Settings(v2=True), Execution(), gpu)
    assert not wants_liger(Settings(), Execution(), cpu)
    with pytest.raises(UserError, match="--liger: its kernels are for GPUs, the device is cpu"):
        wants_liger(Settings(), Execution(liger=True), cpu)
    with pytest.raises(UserError, match="--liger: --v2 tunes the norms"):
        wants_liger(Settings(v2=True), Execution(liger=True), gpu)


def test_liger_leaves_the_loss_alone(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = liger(monkeypatch)
    network = load_model(str(tiny_model), torch.float32)
    assert fuse_parts(network)
    [asked] = calls
    assert asked.pop("model") is network
    assert {name for name, wanted in asked.items() if wanted} == {"rope", "rms_norm", "swiglu", "geglu"}
    assert not asked["fused_linear_cross_entropy"]
    assert not fuse_parts(SimpleNamespace(config=SimpleNamespace(model_type="unknown")))


@pytest.mark.gpu
def test_liger_computes_the_same_losses(tiny_model: Path) -> None:
    pytest.importorskip("liger_kernel", reason="liger-kernel is an extra, [gpu]")
    batch = {
        name: value.cuda() if isinstance(value, torch.Tensor) else value
        for name, value in pack([Example(tuple(range(3, 67)), 20), Example(tuple(range(50, 90)), 10)]).items()
    }
    found = []
    for fused in (False, True):
        torch.manual_seed(0)
        network = load_model(str(tiny_model), torch.float32)
        assert not fused or fuse_parts(network)
        adapter = lak.attach_adapter(network, lak.AdapterConfig(num_layers=3))
        with torch.no_grad():
            for layer in adapter.layers.values():
                layer.gate.fill_(0.7)
        loss, _ = response_loss(network.cuda(), batch)
        loss.backward()
        found.append((loss.detach(), [parameter.grad for parameter in adapter.parameters()]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-3)
