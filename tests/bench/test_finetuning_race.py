"""The race of fine-tuning: each contestant's own loop waits for its turn, counts its tokens and trains what it should."""

import json
import multiprocessing
import threading
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

pytest.importorskip("peft")
from benchmarks.training import finetuning, finetuning_contestants, finetuning_process, finetuning_report
from benchmarks.training.finetuning_process import Race
from tests.support.tiny_model import save_tiny_model

NEEDED = {"trl-lora": "trl", "litgpt": "litgpt"}


@pytest.mark.parametrize("name", finetuning_contestants.CONTESTANTS)
def test_a_contestant_takes_a_step_when_it_is_told_to(name: str, tmp_path: Path) -> None:
    pytest.importorskip(NEEDED.get(name, "peft"))
    (tmp_path / "model").mkdir()
    rows = [{"instruction": f"Say {i}", "output": f"It is {i}, and {i} it is."} for i in range(40)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    race = Race(str(save_tiny_model(tmp_path / "model")), tmp_path / "rows.json", "float32", threads=1, rows=4,
                tokens_at_once=128, rows_at_once=2, steps=3)  # fmt: skip
    ours, theirs = multiprocessing.Pipe()
    steps: list[int] = []
    thread = threading.Thread(target=drive, args=(ours, steps), daemon=True)
    thread.start()
    finetuning_process._race(name, race, theirs)  # in the main thread: loops catch signals
    thread.join(timeout=30)
    assert len(steps) == 2
    kind, (memory, trained) = ours.recv()
    assert kind == "done" and memory > 0
    hidden, heads, layers = 64, 4, 1  # one of three layers: the lowest two stay as they are
    lora = 3 * 8 * (64 + 64 + 64 + 32)
    expected = {
        "ours": layers * (10 * hidden + heads), "adaption-prompt": layers * (10 * hidden + 1),
        "litgpt": layers * (10 * hidden + heads), "lora": lora, "trl-lora": lora,
    }  # fmt: skip
    assert trained == expected[name]
    lengths = [len(e) for e in tokens_of(race)]
    assert all(2 * min(lengths) <= tokens <= 8 * max(lengths) for tokens in steps)
    if name in ("adaption-prompt", "lora", "litgpt"):  # four whole rows, padding not counted
        assert all(4 * min(lengths) <= tokens <= 4 * max(lengths) for tokens in steps)


def drive(connection: Connection, steps: list[int]) -> None:
    """Two steps, then an end; the tokens of each."""
    for _ in range(2):
        assert connection.recv() == ("ready", None)
        connection.send("go")
        kind, (seconds, tokens) = connection.recv()
        assert kind == "step" and seconds > 0
        steps.append(tokens)
    assert connection.recv()[0] == "ready"
    connection.send("stop")


def tokens_of(race: Race) -> list[object]:
    from llama_adapter_kernels.models import load_tokenizer
    from llama_adapter_kernels.training.data import read_rows
    from llama_adapter_kernels.training.tokens import tokenize

    return tokenize(read_rows(race.data), load_tokenizer(race.model), 512)


class Silent(finetuning.Contestant):
    """A contestant without a process."""

    def __init__(self, samples: list[tuple[float, int]], problem: str = "") -> None:
        self.name, self.problem, self.samples, self.memory, self.parameters = "a", problem, samples, 5, 7


def test_results_are_medians_without_the_first_step() -> None:
    found = Silent([(9.0, 90), (1.0, 100), (2.0, 100), (1.0, 60)]).result()
    assert (found["tokens_per_second"], found["samples"]) == (60.0, [100.0, 50.0, 60.0])
    assert (found["peak_bytes"], found["parameters"], found["tokens_per_step"]) == (5, 7, 87)
    assert Silent([(1.0, 1)]).result() == {"problem": "too few steps"}
    assert Silent([], "ValueError: no").result() == {"problem": "ValueError: no"}


def test_the_table_says_which_goals_are_missed(tmp_path: Path) -> None:
    def result(rate: float, peak: int) -> dict[str, object]:
        return {"tokens_per_second": rate, "peak_bytes": peak << 30, "parameters": 1000}

    titles = {name: title for name, (title, _) in finetuning_contestants.CONTESTANTS.items()}
    machine = {"cpu": "a CPU", "threads": 2, "torch_instruction_set": "AVX2", "torch": "2", "commit": "abc"}
    results = {"ours": result(300, 2), "adaption-prompt": result(150, 4), "lora": {"problem": "ValueError: no"},
               "trl-lora": result(290, 2), "litgpt": result(100, 4)}  # fmt: skip
    recorded = {"machine": machine, "model": "M", "data": "d", "rows": 8, "rounds": 3, "titles": titles,
                "results": {"float32": results}}  # fmt: skip
    (tmp_path / "r.json").write_text(json.dumps(recorded))
    (tmp_path / "page.md").write_text(f"top\n{finetuning_report.BEGIN}\nold\n{finetuning_report.END}\nbottom\n")
    finetuning_report.write(tmp_path / "r.json", tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    assert page.startswith("top\n") and page.endswith("\nbottom\n") and "old" not in page
    for said in ("| HF Trainer + PEFT AdaptionPrompt | 1,000 | 150 | 2.00x | 4.00 GiB | 0.50 |", "ValueError: no",
                 "AdaptionPrompt: 2.00 (goal 1.5): held", "LoRA r8: 1.03 (goal 1.2): **missed**",
                 "memory of TRL SFTTrainer, packed, LoRA r8: 1.00 (goal 0.8): **missed**"):  # fmt: skip
        assert said in page, said
