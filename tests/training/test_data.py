"""Instruction rows: what is read, what is refused and how it is said; the template and the tokens with loss."""

import json
import logging
import re
from pathlib import Path

import pytest

from llama_adapter_kernels.errors import UserError
from llama_adapter_kernels.training.data import Row, read_rows
from llama_adapter_kernels.training.tokens import IGNORED_LABEL, tokenize

SHARED = Path(__file__).parents[3] / "shared" / "data"


class Letters:
    """A tokenizer with one token per character, and one for the pair ":)": it crosses the border of a prompt."""

    bos_token_id: int | None = 1
    eos_token_id: int | None = 2

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return [3 if letter == "☺" else 10 + ord(letter) for letter in text.replace(":)", "☺")]


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


ROW = {"instruction": "Say hello.", "input": "", "output": "Hello."}


@pytest.mark.parametrize(
    "text",
    [
        json.dumps([ROW, ROW]),
        json.dumps([ROW, ROW], indent=2),
        json.dumps(ROW) + "\n\n" + json.dumps(ROW) + "\n",
        json.dumps(ROW) + "\r\n" + json.dumps(ROW),
        "\ufeff" + json.dumps([ROW, ROW]),
    ],
    ids=["json", "indented", "jsonl", "windows-lines", "byte-order-mark"],
)
def test_json_and_jsonl(tmp_path: Path, text: str) -> None:
    assert read_rows(write(tmp_path / "rows", text)) == [Row("Say hello.", "", "Hello.")] * 2


def test_line_separators_inside_text_do_not_end_a_row(tmp_path: Path) -> None:
    row = {"instruction": "a\u2028b", "output": "c\u0085d"}
    assert read_rows(write(tmp_path / "rows", json.dumps(row, ensure_ascii=False))) == [Row("a\u2028b", "", "c\u0085d")]


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ('{"instruction": "x"}', 'line 2: field "output" is missing'),
        ('{"instruction": "x", "output": null}', 'line 2: field "output" is null'),
        ('{"instruction": 7, "output": "y"}', 'line 2: field "instruction": expected text, got a number'),
        ('{"instruction": "x", "input": ["a"], "output": "y"}', 'line 2: field "input": expected text, got an array'),
        ('{"instruction": "  ", "output": "y"}', 'line 2: field "instruction" is empty'),
        ('["x", "y"]', "line 2: expected an object with instruction, input and output, got an array"),
        ('{"instruction": "x", "output": "y"', "line 2: not valid JSON"),
        ('{"a": ' * 100_000, "line 2: not valid JSON: nested too deeply"),
        ('{"instruction": "x", "output": ' + "7" * 10_000 + "}", "line 2: not valid JSON: a number of more than 4300"),
        (
            r'{"instruction": "x \ud83d hi", "output": "y"}',
            r'line 2: field "instruction": .* surrogate \(\\ud83d\) at character 3',
        ),
        (r'{"instruction": "x", "input": "\udc80", "output": "y"}', 'line 2: field "input": expected text'),
        (r'{"instruction": "x", "output": "y\ud83d"}', 'line 2: field "output": expected text'),
    ],
)
def test_a_bad_row_is_named_and_can_be_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, bad: str, said: str
) -> None:
    good = json.dumps(ROW)
    path = write(tmp_path / "rows.jsonl", f"{good}\n{bad}\n{good}\n")
    with pytest.raises(UserError, match=f"{re.escape(str(path))}, {said}"):
        read_rows(path)
    with caplog.at_level(logging.WARNING):
        assert len(read_rows(path, skip_bad_rows=True)) == 2
    assert len(caplog.records) == 1
    assert re.search(f"1 of 3 rows left out: {said}", caplog.text)


def test_a_bad_row_of_an_array_is_named_by_its_number(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.json", json.dumps([ROW, {"instruction": "x"}]))
    with pytest.raises(UserError, match='row 2: field "output" is missing'):
        read_rows(path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no rows"),
        ("[]", "no rows"),
        ('[{"instruction": "x",\n]', "line 2, column 1: not valid JSON"),
        ("[" * 100_000, "not valid JSON: nested too deeply"),
        ("[" + "7" * 10_000 + "]", "not valid JSON: a number of more than 4300 digits"),
        (b'{"instruction": "x",\n "\xff"}', "line 2: not UTF-8"),
    ],
)
def test_a_file_without_rows(tmp_path: Path, text: str | bytes, said: str) -> None:
    with pytest.raises(UserError, match=said):
        read_rows(write(tmp_path / "rows", text))


def test_skipping_every_row_leaves_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no rows left, 2 do not fit"):
        read_rows(write(tmp_path / "rows.json", "[1, 2]"), skip_bad_rows=True)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        read_rows(tmp_path / "absent.json")
    with pytest.raises(UserError, match="Is a directory"):
        read_rows(tmp_path)


def test_template() -> None:
    assert Row("Do it.").prompt == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nDo it.\n\n### Response:"
    )
    assert Row("Do it.", "Now.").prompt == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request."
        "\n\n### Instruction:\nDo it.\n\n### Input:\nNow.\n\n### Response:"
    )


def test_only_the_response_and_its_end_carry_loss() -> None:
    [example] = tokenize([Row("Do it.", "", "Done")], Letters(), 512)
    prompt = [1, *(10 + ord(letter) for letter in Row("Do it.").prompt)]
    answer = [*(10 + ord(letter) for letter in "Done"), 2]
    assert list(example.tokens) == prompt + answer
    assert example.labels == [IGNORED_LABEL] * len(prompt) + answer


def test_a_token_across_the_border_leaves_the_prompt_as_generation_sees_it() -> None:
    [example] = tokenize([Row("Smile.", "", ") yes")], Letters(), 512)
    assert list(example.tokens[: example.prompt_length]) == [1, *(10 + ord(letter) for letter in Row("Smile.").prompt)]
    assert list(example.tokens[example.prompt_length :]) == [*(10 + ord(letter) for letter in ") yes"), 2]


def test_truncation_keeps_the_end_and_warns_once(caplog: pytest.LogCaptureFixture) -> None:
    length = 1 + len(Row("Count.").prompt) + 5
    rows = [
        Row("Count.", "", "123456789"),
        Row("Count.", "", "1234"),
        Row("Count." * 9, "", "1"),
        Row("Count.", "", "12345"),
    ]
    with caplog.at_level(logging.WARNING):
        long, fits, no_room, one_too_long = tokenize(rows, Letters(), length)
    assert [record.getMessage() for record in caplog.records] == [
        f"3 of 4 examples are longer than {length} tokens and were truncated; "
        "1 of them have no room for a response and teach nothing"
    ]
    assert len(long) == len(no_room) == len(fits) == len(one_too_long) == length
    assert all(example.tokens[-1] == 2 for example in (long, fits, no_room, one_too_long))
    assert long.labels[-3:] == [10 + ord("3"), 10 + ord("4"), 2]
    assert set(no_room.labels) == {IGNORED_LABEL}


def test_a_tokenizer_without_bos_or_eos() -> None:
    tokenizer = Letters()
    tokenizer.bos_token_id = None
    [example] = tokenize([Row("x", "", "y")], tokenizer, 512)
    assert example.tokens[0] == 10 + ord("B")
    tokenizer.eos_token_id = None
    with pytest.raises(UserError, match="end-of-sequence"):
        tokenize([Row("x", "", "y")], tokenizer, 512)


@pytest.mark.skipif(not SHARED.exists(), reason="the trial data is not here")
def test_real_alpaca_rows_with_the_llama_tokenizer() -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(SHARED / "llama_tokenizer.model"))

    class Llama:
        bos_token_id = 1
        eos_token_id = 2

        def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
            return processor.encode(text)

    rows = read_rows(SHARED / "gpteacher_roleplay.json")
    assert len(rows) == 3146
    examples = tokenize(rows, Llama(), 512)
    for row, example in zip(rows, examples, strict=True):
        assert example.tokens[0] == 1
        assert example.tokens[-1] == 2
        assert len(example) <= 512
        if len(example) < 512:
            assert processor.decode(list(example.tokens)) == row.prompt + row.output
    assert 150 < sum(map(len, examples)) / len(examples) < 350
    seeds = SHARED / "self_instruct_seed_tasks.jsonl"  # its outputs are nested: not Alpaca rows
    with pytest.raises(UserError, match='line 1: field "output" is missing'):
        read_rows(seeds)
