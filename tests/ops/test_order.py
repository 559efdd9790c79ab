"""Which of cuda and triton comes first: the argued order, the recorded one, and how races become a record."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from llama_adapter_kernels.bench import order_record
from llama_adapter_kernels.bench.results import Measurement, Results
from llama_adapter_kernels.cli import app
from llama_adapter_kernels.ops import backends, order
from llama_adapter_kernels.ops.record_file import RecordError


@pytest.fixture(autouse=True)
def _record_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.setattr(order, "RECORD", tmp_path / "order.json")
    order.forget()
    yield
    monkeypatch.undo()
    order.forget()


def races(seconds: dict[tuple[str, str, str, int], tuple[float | None, float | None]]) -> Results:
    """{(question, mode, dtype, head_dim): (cuda's time, triton's)} as a result file of a card of compute capability 9.0."""
    found = Results({"gpu": "A card", "gpu_compute_capability": "9.0"}, {}, {}, "2026-01-01 00:00 UTC")
    for number, ((question, mode, dtype, head_dim), times) in enumerate(seconds.items()):
        for name, time in zip(("ours-cuda", "ours-triton"), times, strict=True):
            found.measurements.append(
                Measurement(
                    case=f"case{number}", title="", question=question, mode=mode, dtype=dtype, shape={"head_dim": head_dim},
                    sweep=None, peer=name, label=name, ours=True, prefix_length=10,
                    status="unavailable" if time is None else "timed", median=time,
                )
            )  # fmt: skip
    return found


@pytest.mark.parametrize(
    ("capability", "pass_name", "dtype", "first"),
    [
        ((8, 0), "forward", torch.bfloat16, "cuda"),
        ((8, 9), "backward", torch.float16, "cuda"),
        ((9, 0), "forward", torch.bfloat16, "triton"),
        ((9, 0), "backward", torch.float16, "triton"),
        ((9, 0), "decode", torch.bfloat16, "cuda"),
        ((9, 0), "forward", torch.float32, "cuda"),
        ((10, 0), "forward", torch.bfloat16, "triton"),
        ((12, 0), "forward", torch.bfloat16, "cuda"),
    ],
)
def test_the_argued_order(capability: tuple[int, int], pass_name: order.Pass, dtype: torch.dtype, first: str) -> None:
    found = order.backends_for(capability, pass_name, dtype, 128)
    assert found[0] == first
    assert sorted(found) == ["cuda", "triton"]


def test_races_decide_for_their_own_key_alone() -> None:
    """Two races of one key count by their geometric mean; a race without both times, and one of a whole model, do not."""
    entries = order_record.record(
        races(
            {
                ("attention", "forward", "bfloat16", 128): (1.0, 2.0),  # cuda twice as fast
                ("varlen", "forward", "bfloat16", 96): (1.0, 0.8),
                ("attention", "forward+backward", "bfloat16", 128): (3.0, 2.0),
                ("decode", "forward", "bfloat16", 64): (1.0, 0.5),
                ("attention", "forward", "float16", 128): (1.0, None),
                ("module", "forward", "float32", 64): (1.0, 0.1),
            }
        ),
        order.RECORD,
    )
    assert {(e.pass_name, e.dtype, e.head_dim, e.faster, e.races) for e in entries} == {
        ("forward", "bfloat16", 128, "cuda", 2), ("backward", "bfloat16", 128, "triton", 1),
        ("decode", "bfloat16", 64, "triton", 1),
    }  # fmt: skip
    (forward,) = (e for e in entries if e.pass_name == "forward")
    assert forward.ratio == pytest.approx((2.0 * 0.8) ** 0.5, abs=1e-4)
    assert order.backends_for((9, 0), "forward", torch.bfloat16, 72)[0] == "cuda"  # argued: triton
    assert order.backends_for((9, 0), "decode", torch.bfloat16, 64)[0] == "triton"  # argued: cuda
    assert order.backends_for((9, 0), "decode", torch.bfloat16, 128)[0] == "cuda"  # not raced
    assert order.backends_for((8, 0), "decode", torch.bfloat16, 64)[0] == "cuda"  # another card
    # Later races replace their keys and keep the others.
    order_record.record(races({("decode", "forward", "bfloat16", 64): (1.0, 1.5)}), order.RECORD)
    assert {key: entry.faster for key, entry in order.load(order.RECORD).items()} == {
        ("9.0", "forward", "bfloat16", 128): "cuda", ("9.0", "backward", "bfloat16", 128): "triton",
        ("9.0", "decode", "bfloat16", 64): "cuda",
    }  # fmt: skip
    assert len(order.RECORD.read_text().splitlines()) == 3 + 2  # one entry a line


def test_choose_follows_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    works = {"cuda", "triton"}
    monkeypatch.setattr(backends, "unavailable_reason", lambda name, device: None if name in works else "no")
    query: Any = SimpleNamespace(device=torch.device("cuda:0"), dtype=torch.bfloat16, shape=torch.Size([1, 2, 3, 128]))
    assert backends.choose(None, query) == "triton"
    assert backends.choose(None, query, "decode") == "cuda"
    works.remove("triton")
    assert backends.choose(None, query) == "cuda"


def test_the_shipped_record_is_valid() -> None:
    for key, entry in order.load(Path(order.__file__).parent / "order.json").items():
        assert key[0].count(".") == 1 and entry.ratio >= 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no llama-adapter-kernels backend order"),
        ("[]", "no llama-adapter-kernels backend order"),
        ('{"format": "x", "version": 1, "entries": []}', "expected 'llama-adapter-kernels backend order' version 1"),
        (json.dumps({"format": order.FORMAT, "version": 1, "entries": [{"faster": "cuda"}]}),
         "no llama-adapter-kernels backend order"),
        (
            json.dumps({"format": order.FORMAT, "version": 1, "entries": [
                {"capability": "9.0", "pass_name": "forward", "dtype": "float32", "head_dim": 64, "faster": "tpu",
                 "ratio": 1, "races": 1, "card": "", "recorded": ""}]}),
            "expected a backend and a pass, got 'tpu'",
        ),
    ],
)  # fmt: skip
def test_a_file_that_is_no_record(text: str, message: str) -> None:
    order.RECORD.write_text(text)
    with pytest.raises(RecordError, match=message):
        order.load(order.RECORD)


def test_races_that_say_nothing() -> None:
    with pytest.raises(RecordError, match="no race on a GPU has times of both"):
        order_record.entries_of(races({("attention", "forward", "bfloat16", 128): (1.0, None)}))
    assert not order.RECORD.exists()


def test_the_option_needs_a_gpu() -> None:
    result = CliRunner().invoke(app, ["bench", "--device", "cpu", "--record-order"])
    assert result.exit_code == 2
    assert "--record-order: expected --device cuda" in result.stderr


def test_every_key_has_an_order() -> None:
    keys = itertools.product(
        ((8, 0), (9, 0), (12, 1)), order.PASSES, (torch.float32, torch.bfloat16), (8, 64, 100, 256)
    )
    for key in keys:
        assert sorted(order.backends_for(*key)) == ["cuda", "triton"]
