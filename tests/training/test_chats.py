"""Chats: which rows are read and refused, how a chat template's text becomes tokens, and that every answer is learned."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llama_adapter_kernels.errors import UserError
from llama_adapter_kernels.generate import Sampling, load_answerer
from llama_adapter_kernels.models import load_tokenizer
from llama_adapter_kernels.training.chats import Chat, Turn
from llama_adapter_kernels.training.data import Row, read_conversations
from llama_adapter_kernels.training.templates import Alpaca, ChatTemplate, choose_template
from llama_adapter_kernels.training.tokens import IGNORED_LABEL, prompt_tokens, tokenize
from tests.support.runs import SHORT, run

# Roles must alternate, as in many templates; an answer ends with "</s>" and a line end.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'user' and loop.index0 > 0 and messages[loop.index0 - 1].role == 'user' %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "[{{ m.role }}] {{ m.content }}{{ eos_token if m.role == 'assistant' }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
ASK, TELL = Turn("user", "Open it."), Turn("assistant", "It is open.")
LONG = Chat((Turn("system", "Be brief."), ASK, TELL, Turn("user", "Close it."), Turn("assistant", "Closed.")))


@pytest.fixture
def tokenizer(tiny_model: Path) -> Any:
    found = load_tokenizer(str(tiny_model))
    found.chat_template = TEMPLATE
    return found


def write(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def messages(*turns: tuple[str, str]) -> dict[str, object]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def test_messages_and_sharegpt_are_read_alike(tmp_path: Path) -> None:
    row = messages(("system", "Be brief."), ("user", "Open it."), ("assistant", "It is open."), ("user", "Thanks."))
    shared = {"conversations": [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "Open it."},
                                {"from": "gpt", "value": "It is open."}]}  # fmt: skip
    chat = Chat((Turn("system", "Be brief."), ASK, TELL))
    assert read_conversations([write(tmp_path / "a.jsonl", row), write(tmp_path / "b.jsonl", shared)]) == [chat, chat]


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (messages(("user", "x")), 'line 2: field "messages": no turn of the assistant, there is nothing to learn'),
        (messages(("user", "x"), ("assistant", " ")), 'line 2: field "messages", turn 2: the answer is empty'),
        (messages(("assistant", "x")), 'line 2: field "messages": expected a turn of the user first'),
        (messages(("user", "x"), ("system", "y"), ("assistant", "z")), "turn 2: expected the system's turn first"),
        (messages(("user", "x"), ("narrator", "y")), "turn 2: \"role\": expected one of .*; got 'narrator'"),
        (messages(("user", "x \ud83d"), ("assistant", "z")), "turn 1: expected text, got a lone surrogate"),
        ({"messages": []}, "no turn of the assistant"),
        ({"messages": "hello"}, "expected an array of turns"),
        ({"messages": [{"role": "user", "content": 7}]}, 'turn 1: expected an object with "role" and "content"'),
        ({"instruction": "x", "output": "y"},
         r'line 2: expected a chat \("messages"\) as in line 1, got an Alpaca row \("instruction"\): a file has rows'),
        ({"conversations": []}, r'expected a chat \("messages"\) as in line 1, got a chat \("conversations"\)'),
    ],
)  # fmt: skip
def test_a_bad_chat_is_named_and_can_be_skipped(tmp_path: Path, bad: object, said: str) -> None:
    good = messages(("user", "x"), ("assistant", "y"))
    path = write(tmp_path / "rows.jsonl", good, bad, good)
    with pytest.raises(UserError, match=said):
        read_conversations([path])
    assert len(read_conversations([path], skip_bad_rows=True)) == 2


def test_an_empty_answer_of_an_alpaca_row(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", {"instruction": "x", "output": " "})
    with pytest.raises(UserError, match='line 1: field "output" is empty'):
        read_conversations([path])


def test_folders_and_parquet(tmp_path: Path) -> None:
    rows = [{"instruction": "x", "input": "", "output": "y"}, {"instruction": "z", "input": "i", "output": "o"}]
    (tmp_path / "data" / "deeper").mkdir(parents=True)
    write(tmp_path / "data" / "b.jsonl", rows[1])
    write(tmp_path / "data" / "deeper" / "c.json", rows[0])
    (tmp_path / "data" / "README.md").write_text("not rows")
    expected = [Row("z", "i", "o"), Row("x", "", "y")]
    assert read_conversations([tmp_path / "data"]) == expected
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no file in this folder ends in"):
        read_conversations([tmp_path / "empty"])
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    pyarrow = pytest.importorskip("pyarrow")
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert read_conversations([tmp_path / "rows.parquet"]) == [Row("x", "", "y"), Row("z", "i", "o")]
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 cut short")
    with pytest.raises(UserError, match="not a Parquet file that can be read"):
        read_conversations([tmp_path / "rows.parquet"])


def learned(example: Any, tokenizer: Any) -> list[str]:
    """The stretches of a conversation that carry loss, as text."""
    stretches: list[list[int]] = [[]]
    for token, label in zip(example.tokens, example.labels, strict=True):
        if label == IGNORED_LABEL:
            stretches.append([])
        else:
            stretches[-1].append(token)
    return [tokenizer.decode(stretch) for stretch in stretches if stretch]


def test_every_answer_is_learned_with_its_end_and_nothing_else(tokenizer: Any) -> None:
    template = ChatTemplate(tokenizer)
    [example] = tokenize([LONG], tokenizer, 512, template)
    assert [text.strip() for text in learned(example, tokenizer)] == ["It is open.</s>", "Closed.</s>"]
    whole = tokenizer.apply_chat_template([turn._asdict() for turn in LONG.turns], tokenize=False).rstrip()
    assert tokenizer.decode(example.tokens) == whole
    # The first answer's prompt is what generation gives a model.
    assert list(example.tokens[: example.prompt_length]) == prompt_tokens(Chat(LONG.turns[:2]), tokenizer, template)
    assert example.tokens.count(tokenizer.bos_token_id) == 1
    assert template.end_tokens() == [tokenizer.eos_token_id]


def test_an_alpaca_row_through_the_chat_template_and_back(tokenizer: Any) -> None:
    [example] = tokenize([Row("Say it.", "word", "Word.")], tokenizer, 512, ChatTemplate(tokenizer))
    assert tokenizer.decode(example.tokens) == "<s>[user] Say it.\n\nword\n[assistant] Word.</s>"
    chat = Chat((Turn("system", "Be brief."), ASK, TELL))
    assert Alpaca().pieces(chat) == [(Row("Be brief.\n\nOpen it.").prompt, False), ("It is open.", True)]


@pytest.mark.parametrize("length", range(20, 60, 3))
def test_a_truncated_chat_ends_with_an_answer(tokenizer: Any, length: int) -> None:
    [whole] = tokenize([LONG], tokenizer, 512, ChatTemplate(tokenizer))
    [example] = tokenize([LONG], tokenizer, length, ChatTemplate(tokenizer))
    assert len(example) <= length
    if example.prompt_length < len(example):
        assert example.tokens[-1] == tokenizer.eos_token_id
        assert example.labels[-1] == tokenizer.eos_token_id
        assert example.tokens[:-1] == whole.tokens[: len(example) - 1]
    else:
        assert length <= whole.prompt_length + 1


def test_templates_that_do_not_fit(tokenizer: Any, tiny_model: Path) -> None:
    with pytest.raises(UserError, match="--template chat: this tokenizer has no chat template"):
        choose_template("auto", load_tokenizer(str(tiny_model)), [LONG])
    with pytest.raises(UserError, match=r"example 2: --template alpaca has one instruction .*, the chat has 4 turns"):
        tokenize([Row("x", "", "y"), LONG], tokenizer, 512, Alpaca())
    twice = Chat((ASK, ASK, TELL))
    with pytest.raises(UserError, match="example 1: the tokenizer's chat template refuses it: roles must alternate"):
        tokenize([twice], tokenizer, 512, ChatTemplate(tokenizer))
    tokenizer.chat_template = TEMPLATE.replace("[{{ m.role }}]", "[{{ m.role }} {{ messages | length }}]")
    with pytest.raises(UserError, match="writes earlier turns differently when later ones come"):
        tokenize([LONG], tokenizer, 512, ChatTemplate(tokenizer))


def test_training_on_chats_and_answering_with_their_template(
    tiny_model: Path, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder remembers the template, and `generate` uses it; a resume with another one is another run."""
    model = tmp_path / "model"
    tokenizer.save_pretrained(model)
    for path in tiny_model.iterdir():
        if not (model / path.name).exists():
            (model / path.name).write_bytes(path.read_bytes())
    rows = write(tmp_path / "rows.jsonl", *[messages(("user", f"x {i}"), ("assistant", "y")) for i in range(9)])
    settings = replace(SHORT, epochs=1)
    assert run(model, rows, tmp_path / "run", settings).finished
    assert json.loads((tmp_path / "run" / "run.json").read_text())["settings"]["template"] == "chat"
    import torch

    answerer = load_answerer(str(model), tmp_path / "run", torch.float32, "cpu")
    assert answerer.template.name == "chat"
    assert len(answerer.answer([Row("x 3")], Sampling(max_new_tokens=3))) == 1
    with pytest.raises(UserError, match="template was chat, is alpaca"):
        run(model, rows, tmp_path / "run", replace(settings, template="alpaca"), resume=True)
