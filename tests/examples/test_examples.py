"""Every example runs as it stands, prints what its text promises and stays short enough to be read at once."""

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))
NEEDS = {
    "transformers_trainer": "accelerate", "packed_batches": "transformers", "many_adapters": "transformers",
    "image_conditioned": "PIL", "peft_trainer": "peft",
    "roberta_classification": "transformers", "timm_vit": "timm",  # runs in tests/adapters/test_timm.py otherwise
}  # fmt: skip
SAYS = {
    "official_multimodal": ["adapted layers: 1 2 3 - logits with a picture: (1, 9, 128)"],
    "image_conditioned": ["with an image: logits differ by", "generated: torch.Size([2, 20])"],
    "operation": ["gate 0: at most", "gate 0.5: at most"],
    "many_adapters": ["base model", "the same as alone", "left: haiku"],
    "roberta_classification": ["adapter: 1,032 of ", "more than two thirds, adapter and head: 9"],
    "timm_vit": ["5 to 9, adapter and head: 8", "adapter: 1,164 of "],
    "decode": ["sequence 0: 12 tokens after 24", "sequence 1: 12 tokens after 7"],
    "packed_batches": ["one row of 448 tokens", "padded, the same batch would have 1000"],
    "peft_trainer": [
        "trainable params: 9,630",
        "checkpoint-60: adapter_config.json, adapter_model.safetensors",
        "in one batch, with the adapter: PEFT does.",
    ],
    "transformers_trainer": ["9,630 of ", "with:    ['It lets the prompt in.', 'At zero, so nothing changes.']"],
}


# The example of the official checkpoint puts to work what this warning says is kept.
@pytest.mark.filterwarnings("ignore:kept beside the adapter")
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if path.stem in NEEDS:
        pytest.importorskip(NEEDS[path.stem])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(path)])
    runpy.run_path(str(path), run_name="__main__")
    said = capsys.readouterr().out
    for words in SAYS.get(path.stem, []):
        assert words in said
    assert "not the same" not in said


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_short_enough_to_be_read(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) < 60
    assert text.startswith('"""')
    assert f"python examples/{path.name}" in text  # how to run it, for those who open the file first


def test_the_table_lists_every_example() -> None:
    text = (EXAMPLES[0].parent / "README.md").read_text()
    assert [path.name for path in EXAMPLES if f"[{path.name}]({path.name})" not in text] == []
