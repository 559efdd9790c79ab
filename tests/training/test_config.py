"""Options in a YAML file: read with the same care as the command line, written back so that they repeat the run."""

import os
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from llama_adapter_kernels.cli import app
from llama_adapter_kernels.errors import UserError
from llama_adapter_kernels.training import finetune as fine_tuning
from llama_adapter_kernels.training.config_file import CONFIG_FILE, MADE_WITH, effective, known_options, read_config
from llama_adapter_kernels.training.settings import Execution, Settings, Task, options_of
from tests.support.runs import QUIET, SHORT, run


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the command hands on, instead of a run."""
    seen: list[Any] = []

    def note(*parts: Any) -> str:
        seen.extend(parts)
        return "noted"

    monkeypatch.setattr(fine_tuning, "run_task", note)
    return seen


def call(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["finetune", *map(str, arguments)])


def written(folder: Path, text: str) -> Path:
    path = folder / "options.yaml"
    path.write_text(text)
    return path


BASE = "model: m\ndata: [a.json, b.json]\noutput: out\n"


def test_a_file_gives_options_and_the_command_line_wins(tmp_path: Path, given: list[Any]) -> None:
    path = written(
        tmp_path,
        BASE + "epochs: 3\nbase-learning-rate: 1e-1\nbetas: [0.8, 0.9]\nv2: true\nlog_steps: 7\nmax_steps: null\n",
    )
    assert call("--config", path, "--epochs", 9, "--seed", 4).exit_code == 0
    task, settings, execution = given
    assert (task.model, task.data, task.output) == ("m", [Path("a.json"), Path("b.json")], Path("out"))
    assert settings == Settings(epochs=9, base_learning_rate=0.1, betas=(0.8, 0.9), v2=True, seed=4)
    assert execution == Execution(log_steps=7)


def test_without_a_file_the_options_are_the_dataclasses_defaults(given: list[Any]) -> None:
    assert call("--model", "m", "--data", "a", "--output", "o").exit_code == 0
    assert given == [Task("m", [Path("a")], Path("o")), Settings(), Execution()]
    assert "Missing option" in call("--model", "m", "--data", "a").output


def test_of_two_that_exclude_each_other_the_command_line_decides(tmp_path: Path, given: list[Any]) -> None:
    path = written(tmp_path, BASE + "batch_size: 16\ndevice: cuda\n")
    assert call("--config", path, "--tokens-per-step", 4096, "--cpu").exit_code == 0
    _, settings, execution = given
    assert (settings.tokens_per_step, settings.batch_size) == (4096, Settings().batch_size)
    assert (execution.on_cpu, execution.device) == (True, "auto")
    result = call("--config", written(tmp_path, BASE + "batch_size: 16\ntokens_per_step: 4096\n"))
    assert "--batch-size, --tokens-per-step: expected one of them, got both" in result.stderr


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("epoch: 3", "epoch: no such option; did you mean epochs?"),
        ("token-per-step: 3", "token-per-step: no such option; did you mean tokens_per_step?"),
        ("wibble: 3", "wibble: no such option; llama-adapter finetune --help lists all"),
        ("3: 3", "3: no such option"),
        ("epochs: five", "epochs: expected a whole number, got 'five'"),
        ("epochs: 2.5", "epochs: expected a whole number, got 2.5"),
        ("epochs: true", "epochs: expected a whole number, got True"),
        ("weight_decay: much", "weight_decay: expected a number, got 'much'"),
        ("v2: maybe", "v2: expected true or false, got 'maybe'"),
        ("gate: 3", "gate: expected text, got 3"),
        ("data: [a.json, 3]", "data: expected text, got 3"),
        ("betas: 0.9", "betas: expected a list of 2 numbers, got 0.9"),
        ("epochs: 3\nepochs-: 3", "epochs-: no such option"),
        ("log-steps: 3\nlog_steps: 3", "log_steps is there twice"),
        ("[1, 2]", "expected options and their values (epochs: 5), got list"),
        ("epochs: [", "not a YAML file that can be read"),
        ("a: \x00", "not a YAML file that can be read"),
        ("!!python/object/apply:os.system [ls]", "not a YAML file that can be read"),
    ],
)
def test_what_a_file_must_not_say(tmp_path: Path, given: list[Any], text: str, said: str) -> None:
    path = written(tmp_path, text)
    result = call("--config", path, "--model", "m", "--data", "a", "--output", "o")
    assert (result.exit_code, given) == (2, [])
    assert f"--config {path}: {said}" in result.stderr
    assert "Traceback" not in result.output


def test_a_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.yaml: No such file"):
        read_config(tmp_path / "absent.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"model: caf\xe9")
    with pytest.raises(UserError, match="not a YAML file"):
        read_config(tmp_path / "latin.yaml")
    assert read_config(written(tmp_path, "# nothing yet\n")) == {}


def test_every_field_that_a_run_has_is_an_option() -> None:
    """But for what only Python's callers give."""
    named = {one.name for one in known_options().values()}
    everything = {one.name for kind in (Task, Settings, Execution) for one in fields(kind)}
    assert everything - named == {"conditioning_sizes"}
    assert all(one.metadata["help"] for one in known_options().values())


def test_what_a_run_was_given_is_written_back(
    tiny_model: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what the model and the data decided filled in, and as a file that repeats the run."""
    execution = replace(QUIET, gradient_checkpointing=True)
    first = run(tiny_model, rows_file, tmp_path / "one", replace(SHORT, max_steps=2), execution=execution)
    content = yaml.safe_load((tmp_path / "one" / CONFIG_FILE).read_text())
    assert content["template"] == "alpaca"
    assert content["max_length"] == 512
    assert (content["device"], content["memory"], content["report_to"]) == ("cpu", "low", "csv")
    assert "cpu" not in content
    assert content[MADE_WITH].keys() >= {"python", "llama-adapter-kernels", "commit", "torch", "transformers"}
    again = call("--config", tmp_path / "one" / CONFIG_FILE, "--output", tmp_path / "two")
    assert again.exit_code == 0, again.output
    logs = [(tmp_path / name / "training_log.csv").read_text() for name in ("one", "two")]
    assert logs[0] == logs[1]
    assert first.step == 2


def test_what_is_written_can_be_read(tmp_path: Path) -> None:
    """For every option at once, with values that are not the defaults."""
    odd = {int: 3, float: 0.25, bool: True, str: "x"}

    def changed(kind: type) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for one in options_of(kind).values():
            of = next((part for part in odd if one.type in (part, part | None)), None)
            found[one.name] = odd[of] if of else {"betas": (0.1, 0.2)}.get(one.name, [Path("p")])
        return found

    task = Task(**changed(Task) | {"output": tmp_path})
    settings, execution = Settings(**changed(Settings)), Execution(**changed(Execution))
    values = effective(task, settings, execution)
    path = written(tmp_path, yaml.safe_dump(values))
    assert read_config(path) == values
    assert "batch_size" not in values  # tokens_per_step decides


def test_the_example_of_the_documentation(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "finetuning.md").read_text()
    options = read_config(written(tmp_path, text.partition("```yaml")[2].partition("```")[0]))
    assert options["tokens_per_step"] == 32768


def test_a_file_that_cannot_be_written_is_one_sentence(
    tiny_model: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(fine_tuning, "write_config", full)
    with pytest.raises(UserError, match="run: No space left on device"):
        run(tiny_model, rows_file, tmp_path / "run")
