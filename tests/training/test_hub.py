"""Adapters and data sets of a hub that is not there: what is uploaded, and what is said where it cannot be."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import llama_adapter_kernels as lak
from llama_adapter_kernels import hub
from llama_adapter_kernels.errors import UserError
from llama_adapter_kernels.models import load_model
from llama_adapter_kernels.training import finetune as fine_tuning
from tests.support.runs import QUIET, SHORT, run

ONE_STEP = replace(SHORT, max_steps=1)


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
