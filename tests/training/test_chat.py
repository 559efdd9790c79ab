"""Conversations of several turns: what the model is given, adapters exchanged meanwhile, lines through a pipe."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import llama_adapter_kernels as lak
from llama_adapter_kernels import hub
from llama_adapter_kernels.chat import Conversation
from llama_adapter_kernels.cli import app
from llama_adapter_kernels.errors import UserError
from llama_adapter_kernels.generate import Answerer, Sampling, load_answerer
from llama_adapter_kernels.models import load_model, load_model_and_tokenizer
from llama_adapter_kernels.training.chats import Chat, Turn
from llama_adapter_kernels.training.templates import Alpaca, ChatTemplate

GREEDY = Sampling(max_new_tokens=8)
SIMPLE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token if m.role == 'assistant' }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def saved_adapter(model: Path, folder: Path, seed: int, layers: int = 3, template: str | None = None) -> Path:
    """With open gates, so that it changes every answer."""
    torch.manual_seed(seed)
    network = load_model(str(model), torch.float32)
    handle = lak.attach_adapter(network, lak.AdapterConfig(prefix_length=4, num_layers=layers))
    with torch.no_grad():
        for name, parameter in handle.named_parameters():
            if "gate" in name:
                parameter.uniform_(1.0, 2.0)
    handle.save_pretrained(folder)
    if template is not None:
        (folder / "run.json").write_text(json.dumps({"settings": {"template": template}}))
    return folder


@pytest.fixture(scope="module")
def french(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_adapter(tiny_model, tmp_path_factory.mktemp("a") / "french", 1)


@pytest.fixture(scope="module")
def haiku(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_adapter(tiny_model, tmp_path_factory.mktemp("b") / "haiku", 2, layers=2)


@pytest.fixture
def talk(tiny_model: Path) -> Conversation:
    return Conversation(load_answerer(str(tiny_model), None, torch.float64, "cpu"), GREEDY)


def say(talk: Conversation, text: str) -> str:
    pieces: list[str] = []
    talk.say(text, pieces.append)
    said = "".join(pieces)
    assert said.endswith("\n")
    return said.strip()


def test_earlier_turns_are_given_again(talk: Conversation, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[list[int]] = []
    answer = Answerer.continuations

    def note(self: Answerer, prompts: Any, *more: Any) -> Any:
        given.extend(prompts)
        return answer(self, prompts, *more)

    monkeypatch.setattr(Answerer, "continuations", note)
    first = say(talk, "Open the file.")
    second = say(talk, "Close it.")
    assert talk.turns == [Turn("user", "Open the file."), Turn("assistant", first), Turn("user", "Close it."),
                          Turn("assistant", second)]  # fmt: skip
    tokenizer = talk._answerer.tokenizer
    asked = Alpaca().dialogue(Chat(tuple(talk.turns[:3])))
    assert given[1] == [tokenizer.bos_token_id, *tokenizer.encode(asked, add_special_tokens=False)]
    assert asked.count("### Instruction:") == 2
    assert asked.endswith(f"{first}\n\n### Instruction:\nClose it.\n\n### Response:")
    talk.reset()
    assert say(talk, "Open the file.") == first


def test_the_tokenizers_template_writes_every_turn(tiny_model: Path) -> None:
    model, tokenizer = load_model_and_tokenizer(str(tiny_model), torch.float32)
    tokenizer.chat_template = SIMPLE
    template = ChatTemplate(tokenizer)
    talk = Conversation(Answerer(model, tokenizer, template), GREEDY, "chat", system="Be brief.")
    talk.turns = [Turn("user", "a"), Turn("assistant", "b")]
    tokens = talk._tokens([*talk.turns, Turn("user", "c")])
    assert tokens == tokenizer.encode(
        "[system] Be brief.\n[user] a\n[assistant] b</s>\n[user] c\n[assistant] ", add_special_tokens=False
    )


def test_alpaca_with_a_system_turn() -> None:
    chat = Chat((Turn("system", "Be brief."), Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c")))
    assert "### Instruction:\nBe brief.\n\na\n\n### Response:b\n\n### Instruction:\nc" in Alpaca().dialogue(chat)


def test_adapters_are_exchanged(talk: Conversation, french: Path, haiku: Path) -> None:
    def answered(name: str) -> str:
        talk.reset()
        assert talk.use(name) == Path(name).name
        return say(talk, "Describe the list.")

    base = answered("none")
    assert talk.active is None
    first, second = answered(str(french)), answered(str(haiku))
    assert len({base, first, second}) == 3
    assert (talk.adapters, talk.active) == (["french", "haiku"], "haiku")
    assert (answered("french"), answered("none"), answered("haiku")) == (first, base, second)


def test_one_conversation_two_adapters(talk: Conversation, french: Path) -> None:
    """The turns stay when another adapter goes on."""
    say(talk, "Open the file.")
    talk.use(str(french))
    say(talk, "Close it.")
    assert len(talk.turns) == 4


def test_an_adapter_brings_its_template(tiny_model: Path, tmp_path: Path) -> None:
    model, tokenizer = load_model_and_tokenizer(str(tiny_model), torch.float32)
    tokenizer.chat_template = SIMPLE
    chatty = saved_adapter(tiny_model, tmp_path / "chatty", 4, template="chat")
    talk = Conversation(Answerer(model, tokenizer), GREEDY)
    for name, template in ((str(chatty), "chat"), ("none", "alpaca"), ("chatty", "chat")):
        talk.use(name)
        assert talk._answerer.template.name == template
    fixed = Conversation(Answerer(model, tokenizer), GREEDY, "alpaca")
    fixed.use("chatty")
    assert fixed._answerer.template.name == "alpaca"


def test_names_that_are_taken(talk: Conversation, french: Path, tiny_model: Path, tmp_path: Path) -> None:
    talk.use(str(french))
    assert talk.use(str(saved_adapter(tiny_model, tmp_path / "french", 5))) == "french-2"
    assert talk.use(str(saved_adapter(tiny_model, tmp_path / "none", 6))) == "none-2"
    assert talk.use(str(saved_adapter(tiny_model, tmp_path / "é à", 6))) == "-"


def test_adapters_that_do_not_fit(talk: Conversation, french: Path, tmp_path: Path) -> None:
    talk.use(str(french))
    before = say(talk, "Open it.")
    other = tmp_path / "other"
    other.mkdir()
    for wanted, said in ((str(other), "other"), (str(tmp_path / "absent"), "absent: no such folder")):
        with pytest.raises(UserError, match=said):
            talk.use(wanted)
    assert talk.adapters == ["french"]
    talk.reset()
    assert say(talk, "Open it.") == before


def test_the_oldest_turns_make_room(talk: Conversation) -> None:
    talk._answerer.context = 200
    lengths = [talk.say("Describe the list of paths. " * 3, lambda _: None) for _ in range(4)]
    assert lengths[0] == 0
    assert lengths[-1] > 0
    assert len(talk.turns) == 8
    with pytest.raises(UserError, match="the model's context ends at 200"):
        talk.say("word " * 400, lambda _: None)
    assert len(talk.turns) == 8


def test_an_adapter_of_the_hub(
    talk: Conversation, french: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    import huggingface_hub

    monkeypatch.setattr(hub, "check_reachable", lambda: None)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(french))
    assert talk.use("someone/french") == "french"
    monkeypatch.undo()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="someone/else: no such folder, and not from the hub either: HF_HUB_OFFLINE"):
        talk.use("someone/else")


# ---- the command ----

Call = Callable[..., Any]


@pytest.fixture
def call(tiny_model: Path) -> Call:
    def run(lines: str | bytes, *more: object) -> Any:
        arguments = ["--model", tiny_model, "--device", "cpu", "--max-new-tokens", 6, *more]
        return CliRunner().invoke(app, ["chat", *map(str, arguments)], input=lines)

    return run


def test_lines_through_a_pipe(call: Call, french: Path, haiku: Path) -> None:
    lines = "Open it.\n\n/adapter\n/adapter none\n/reset\nOpen it.\n/adapter haiku\n/help\n/quit\nnever\n"
    result = call(lines, "--adapter", french, "--adapter", haiku)
    assert result.exit_code == 0, result.output
    answers = result.stdout.splitlines()
    assert len(answers) >= 2
    assert answers[0] != answers[1]
    assert "adapters: french, haiku, none; french answers" in result.stderr
    assert "(none answers from now on)" in result.stderr
    assert "(forgotten)" in result.stderr
    assert "/reset " in result.stderr
    assert ">" not in result.stdout.replace("->", "")


def test_what_goes_wrong_is_said_and_the_next_line_is_read(call: Call) -> None:
    result = call(b"/adapter nowhere\n/nonsense\nbad \xff text\n" + b"word " * 600 + b"\nOpen it.\n")
    assert result.exit_code == 1
    for said in ("nowhere: no such folder", "/nonsense: expected one of /adapter", "lone surrogate", "context ends at"):
        assert said in result.stderr
    assert result.stdout.strip()
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--template", "x"], "--template: expected auto, alpaca or chat, got 'x'"),
        (["--template", "chat"], "this tokenizer has no chat template"),
        (["--seed", -1], "--seed: expected a number"),
        (["--temperature", -1], "--temperature: expected 0"),
        (["--adapter", "/absent"], "--adapter /absent: no such folder"),
        (["--device", "gpu"], "--device: expected auto"),
    ],
)
def test_mistakes_cost_one_line(call: Call, arguments: list[object], said: str) -> None:
    result = call("Open it.\n", *arguments)
    assert result.exit_code == 2
    assert said in result.stderr
    assert "Traceback" not in result.output
