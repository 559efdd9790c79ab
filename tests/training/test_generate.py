"""Answers: the same alone and in a ragged batch, with and without adapter; their end, their sampling, the command."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import llama_adapter_kernels as lak
from llama_adapter_kernels.cli import app
from llama_adapter_kernels.errors import UserError
from llama_adapter_kernels.generate import Answerer, Sampling, left_padded, load_answerer, read_instructions
from llama_adapter_kernels.training.data import Row
from llama_adapter_kernels.training.tokens import prompt_tokens

pytest.importorskip("transformers")
from llama_adapter_kernels.models import load_model_and_tokenizer

ROWS = [Row("Open the file."), Row("Describe what this does.", "socket.close(self)"), Row("List " * 30), Row("Go.")]
GREEDY = Sampling(max_new_tokens=12)
# float64: a tie broken by rounding would change an answer. The op layer computes it as well.
EXACT = torch.float64


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Open gates, so that a wrong prefix shows."""
    torch.manual_seed(3)
    model, _ = load_model_and_tokenizer(str(tiny_model), torch.float32)
    handle = lak.attach_adapter(model, lak.AdapterConfig(prefix_length=6, num_layers=3))
    with torch.no_grad():
        for name, parameter in handle.named_parameters():
            if "gate" in name:
                parameter.uniform_(0.5, 2.0)
    folder = tmp_path_factory.mktemp("adapter")
    handle.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tiny_model: Path) -> Answerer:
    return load_answerer(str(tiny_model), None, EXACT, "cpu")


@pytest.fixture(scope="module")
def adapted(tiny_model: Path, adapter: Path) -> Answerer:
    return load_answerer(str(tiny_model), adapter, EXACT, "cpu")


@pytest.mark.parametrize("which", ["base", "adapted"])
def test_a_ragged_batch_answers_as_one_by_one(which: str, request: pytest.FixtureRequest) -> None:
    answerer: Answerer = request.getfixturevalue(which)
    alone = [answerer.answer([row], GREEDY)[0] for row in ROWS]
    assert answerer.answer(ROWS, GREEDY) == alone
    assert dict(answerer.answer_all(ROWS, GREEDY, batch_size=3)) == dict(enumerate(alone))
    assert len(set(alone)) > 1


def test_generation_is_the_argmax_of_full_passes(adapted: Answerer) -> None:
    """Without cache and without padding, token by token."""
    tokens = prompt_tokens(ROWS[1], adapted.tokenizer)
    start = len(tokens)
    with torch.no_grad():
        for _ in range(GREEDY.max_new_tokens):
            tokens.append(int(adapted.model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    assert adapted.continuations([tokens[:start]], GREEDY) == [tokens[start:]]


def test_the_adapter_changes_the_answer(base: Answerer, adapted: Answerer) -> None:
    assert base.answer(ROWS, GREEDY) != adapted.answer(ROWS, GREEDY)


def test_every_answer_ends_at_its_own_end_of_sequence(base: Answerer) -> None:
    """Random weights hardly ever end: take a token in the middle of one answer for the end."""
    prompts = [prompt_tokens(row, base.tokenizer) for row in ROWS]
    whole = base.continuations(prompts, GREEDY)
    assert [len(tokens) for tokens in whole] == [12] * 4
    end = next(token for token in whole[0][3:9] if token not in whole[3])
    ends, base.end_tokens = base.end_tokens, [*base.end_tokens, end]
    try:
        answers = base.continuations(prompts, GREEDY)
    finally:
        base.end_tokens = ends
    assert answers == [tokens[: tokens.index(end)] if end in tokens else tokens for tokens in whole]
    assert len(answers[0]) < 12
    assert len(answers[3]) == 12


def test_streamed_pieces_are_the_answer(base: Answerer) -> None:
    pieces: list[str] = []
    [answer] = base.answer([ROWS[0]], GREEDY, stream=pieces.append)
    assert len(pieces) > 2
    assert "".join(pieces).strip() == answer


def test_sampling(base: Answerer) -> None:
    def sampled(seed: int, temperature: float, top_p: float) -> str:
        torch.manual_seed(seed)
        return base.answer([ROWS[0]], Sampling(12, temperature, top_p))[0]

    [greedy] = base.answer([ROWS[0]], GREEDY)
    assert sampled(0, 1.0, 1e-6) == greedy  # the most probable token alone
    assert sampled(0, 1e-4, 1.0) == greedy
    assert sampled(0, 1.0, 1.0) == sampled(0, 1.0, 1.0)
    assert len({sampled(seed, 1.0, 1.0) for seed in range(3)}) > 1


def test_left_padding() -> None:
    tokens, mask = left_padded([[5, 6, 7], [8]], padding=2)
    assert tokens.tolist() == [[5, 6, 7], [2, 2, 8]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_a_prompt_longer_than_the_context(base: Answerer) -> None:
    with pytest.raises(UserError, match=r"has \d+ tokens, the model's context ends at 512"):
        base.answer([Row("word " * 600)], GREEDY)
    [answer] = base.answer([Row("w " * 330)], Sampling(max_new_tokens=5000))  # stops where the context ends
    assert answer


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_new_tokens": 0},
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"temperature": 1e-30},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_p": math.nan},
    ],
    ids=str,
)
def test_sampling_out_of_range(arguments: dict[str, float]) -> None:
    with pytest.raises(UserError, match="expected"):
        Sampling(**arguments)  # type: ignore[arg-type]


def test_instructions_from_text_and_json(tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("Open it.\n\n  Close it.\n")
    assert read_instructions(tmp_path / "lines.txt") == [Row("Open it."), Row("Close it.")]
    (tmp_path / "rows.jsonl").write_text('{"instruction": "Open it.", "input": "door"}\n')
    assert read_instructions(tmp_path / "rows.jsonl") == [Row("Open it.", "door")]
    (tmp_path / "none.txt").write_text("\n")
    with pytest.raises(UserError, match="no instructions"):
        read_instructions(tmp_path / "none.txt")


def generate(model: Path, *arguments: object, typed: str | None = None) -> tuple[int, str, str]:
    options = ["generate", "--model", model, "--cpu", "--max-new-tokens", 5, *arguments]
    result = CliRunner().invoke(app, [str(option) for option in options], input=typed)
    return result.exit_code, result.stdout, result.stderr


def test_command(tiny_model: Path, adapter: Path, tmp_path: Path) -> None:
    status, one, _ = generate(tiny_model, "--instruction", "Go.", "--adapter", adapter)
    assert status == 0
    status, typed, _ = generate(tiny_model, "--adapter", adapter, typed="Go.\n\nGo.\n")
    assert status == 0
    assert typed == one * 2
    file = tmp_path / "rows.txt"
    file.write_text("Go.\nOpen the file.\n")
    status, lines, _ = generate(tiny_model, "--file", file, "--adapter", adapter)
    assert status == 0
    first, second = map(json.loads, lines.splitlines())
    assert first == {"instruction": "Go.", "input": "", "output": one.strip()}
    assert second["instruction"] == "Open the file."
    status, printed, _ = generate(tiny_model, "--file", file, "--adapter", adapter, "--output", tmp_path / "out.jsonl")
    assert (status, printed) == (0, "")
    assert (tmp_path / "out.jsonl").read_text() == lines


def test_a_row_that_is_too_long_costs_its_own_answer_alone(tiny_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.txt"
    file.write_text("Go.\n" + "word " * 600 + "\nOpen the file.\n")
    status, lines, error = generate(tiny_model, "--file", file)
    assert status == 1
    assert re.search(
        r"error: .*rows.txt, row 2: the instruction has \d+ tokens, the model's context ends at 512", error
    )
    answers = [json.loads(line) for line in lines.splitlines()]
    assert [set(answer) for answer in answers] == [
        {"instruction", "input", key} for key in ("output", "error", "output")
    ]
    file.write_text("Go.\nOpen the file.\n")
    _, without, _ = generate(tiny_model, "--file", file)
    assert [answers[0], answers[2]] == [json.loads(line) for line in without.splitlines()]


def test_what_is_no_text_costs_one_line_of_a_conversation(tiny_model: Path) -> None:
    arguments = ["-m", "llama_adapter_kernels", "generate", "--model", tiny_model, "--cpu", "--max-new-tokens", "5"]
    result = subprocess.run([sys.executable, *arguments], input=b"\xff\xfe\nGo.\n", capture_output=True, check=True)
    assert b"error: expected text, got a lone surrogate" in result.stderr
    assert b"Traceback" not in result.stderr
    assert result.stdout.strip()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--instruction", "x", "--file", "y"], "expected one of them"),
        (["--instruction", " "], "expected text"),
        (["--file", "/absent.json"], "No such file"),
        (["--instruction", "x", "--adapter", "/absent"], "no such folder"),
        (["--instruction", "x", "--top-p", "2"], "--top-p"),
        (["--instruction", "x", "--dtype", "int8"], "--dtype: expected one of"),
        (["--instruction", "x", "--temperature", "nan"], "--temperature: expected 0"),
        (["--instruction", "x", "--seed", "-1"], "--seed: expected a number from 0"),
        (["--instruction", "x", "--seed", str(2**70)], "--seed: expected a number from 0"),
        (["--instruction", "x \udcff"], "--instruction: expected text, got a lone surrogate"),
        (["--instruction", "x", "--input", "\ud83d"], "--input: expected text, got a lone surrogate"),
        (["--input", "x"], "--input: belongs to an --instruction"),
        (["--instruction", "x", "--output", "y"], "--output: belongs to a --file"),
        (["--file", "y", "--output", "/absent/z"], "its folder does not exist"),
        (["--file", "y", "--output", "/tmp"], "it is a folder"),
    ],
)
def test_mistakes_cost_one_line(tiny_model: Path, arguments: list[str], said: str) -> None:
    status, _, error = generate(tiny_model, *arguments)
    assert status == 2
    [line] = [line for line in error.splitlines() if line.startswith("error: ")]
    assert said in line
    assert "Traceback" not in error


def test_an_adapter_for_another_model(tiny_model: Path, tmp_path: Path) -> None:
    """The message names both sides: the sizes of the adapter and those of the model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    other = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=48, intermediate_size=32, num_hidden_layers=2, num_attention_heads=3,
            num_key_value_heads=3,
        )
    )  # fmt: skip
    lak.attach_adapter(other, lak.AdapterConfig(prefix_length=4, num_layers=2)).save_pretrained(tmp_path)
    status, _, error = generate(tiny_model, "--instruction", "x", "--adapter", tmp_path)
    assert status == 2
    assert "48" in error
    assert "64" in error
    assert "Traceback" not in error
