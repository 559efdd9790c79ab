"""Fine-tuning on rows with pictures or sounds, and answers about them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import llama_adapter_kernels as lak
from llama_adapter_kernels.cli import app
from llama_adapter_kernels.errors import UserError
from llama_adapter_kernels.training.data import read_rows
from llama_adapter_kernels.training.settings import Settings
from tests.support.encoders import save_vision
from tests.support.runs import QUIET, run

COLOURS = {"red": (220, 20, 20), "green": (20, 200, 40), "blue": (30, 40, 230)}
runner = CliRunner()


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vision(tmp_path_factory.mktemp("encoder"), "vit")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows about pictures of one colour, and one row without a picture."""
    folder = tmp_path_factory.mktemp("pictures")
    rows = []
    for number in range(12):
        name = list(COLOURS)[number % 3]
        Image.new("RGB", (20, 20), COLOURS[name]).save(folder / f"{number}.png")
        rows.append({"instruction": "Which colour?", "output": name, "image": f"{number}.png"})
    rows.append({"instruction": "Say no.", "output": "no"})
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder


def settings(encoder: Path, **more: object) -> Settings:
    sizes = (("depths", 2),)
    return Settings(epochs=2, batch_size=6, base_learning_rate=2.0, image_encoder=str(encoder), layers=3,
                    conditioning="multi_scale", conditioning_sizes=sizes, conditioning_rate=0.1, **more)  # fmt: skip


def test_an_adapter_learns_to_see_and_is_used(tiny_model: Path, pictures: Path, encoder: Path, tmp_path: Path) -> None:
    output = tmp_path / "adapter"
    wanted = replace(settings(encoder), epochs=40, conditioning_rate=0.2, max_gradient_norm=1.0)
    quiet = replace(QUIET, save_steps=200, features=str(tmp_path / "kept"))
    outcome = run(tiny_model, pictures / "rows.json", output, wanted, execution=quiet)
    assert outcome.losses[max(outcome.losses)] < outcome.losses[1] / 3
    assert len(list((tmp_path / "kept").glob("*.safetensors"))) == 3  # by content: three different pictures
    for name, colour in COLOURS.items():
        Image.new("RGB", (30, 10), colour).save(tmp_path / "shown.png")
        answer = runner.invoke(app, ["generate", "--model", str(tiny_model), "--adapter", str(output), "--cpu",
                                     "--instruction", "Which colour?", "--image", str(tmp_path / "shown.png")])  # fmt: skip
        assert answer.exit_code == 0, answer.output
        assert answer.stdout.strip() == name


def test_an_interrupted_run_ends_with_the_same_weights(
    tiny_model: Path, pictures: Path, encoder: Path, tmp_path: Path
) -> None:
    whole = run(tiny_model, pictures / "rows.json", tmp_path / "whole", settings(encoder))
    run(tiny_model, pictures / "rows.json", tmp_path / "cut", settings(encoder, max_steps=None))
    for file in ("adapter.safetensors", "conditioning.safetensors", "conditioning.json"):
        (tmp_path / "cut" / file).unlink()
    import shutil

    last = max((tmp_path / "cut").glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    assert (last / "conditioning.safetensors").exists()
    shutil.rmtree(last) if last.name == f"checkpoint-{whole.step}" else None
    run(tiny_model, pictures / "rows.json", tmp_path / "cut", settings(encoder), resume=True)
    for file in ("adapter.safetensors", "conditioning.safetensors"):
        assert (tmp_path / "cut" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_the_conditioning_learns_at_its_own_rate(
    tiny_model: Path, pictures: Path, encoder: Path, tmp_path: Path
) -> None:
    run(
        tiny_model,
        pictures / "rows.json",
        tmp_path / "out",
        replace(settings(encoder), conditioning_rate=0.0, max_steps=2),
    )
    torch.manual_seed(0)
    from llama_adapter_kernels.media.encoders import load_encoder
    from llama_adapter_kernels.models import load_model
    from llama_adapter_kernels.training.preparation import attach, attach_senses

    network = load_model(str(tiny_model), torch.float32)
    attach(network, settings(encoder))
    untrained = attach_senses(network, load_encoder(str(encoder), "image"), settings(encoder), QUIET)
    assert untrained is not None
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "out" / "conditioning.safetensors")
    for name, tensor in untrained.projection.state_dict().items():
        assert torch.equal(saved[name], tensor)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": "0.png", "audio": "a.wav"}, r'row 1: fields "image" and "audio": expected one of them, got both'),
        ({"image": "none.png"}, r'row 1: field "image": no file .*none\.png'),
        ({"image": 7}, r'row 1: field "image": expected a path as text, got a number'),
    ],
)
def test_rows_that_do_not_fit(row: dict, message: str, pictures: Path) -> None:
    (pictures / "bad.json").write_text(json.dumps([{"instruction": "x", "output": "y", **row}]))
    with pytest.raises(UserError, match=message):
        read_rows(pictures / "bad.json")


def test_a_second_stage_starts_where_the_first_ended(
    tiny_model: Path, pictures: Path, encoder: Path, tmp_path: Path
) -> None:
    """Projection and prompts first, then biases and norms as well: the papers' two stages."""
    from safetensors.torch import load_file

    first, second = tmp_path / "first", tmp_path / "second"
    run(tiny_model, pictures / "rows.json", first, settings(encoder, max_steps=3))
    still = replace(settings(encoder, max_steps=1), init=str(first), v2=True, lora_rank=0, base_learning_rate=0.0)
    run(tiny_model, pictures / "rows.json", second, still)
    before, after = (load_file(folder / "adapter.safetensors") for folder in (first, second))
    assert before.keys() < after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert (first / "conditioning.safetensors").read_bytes() == (second / "conditioning.safetensors").read_bytes()
    learned = tmp_path / "learned"
    run(tiny_model, pictures / "rows.json", learned, replace(still, base_learning_rate=1.0, max_steps=2))
    tuned = load_file(learned / "adapter.safetensors")
    assert any(not torch.equal(tuned[name], tensor) for name, tensor in after.items() if name not in before)
    with pytest.raises(
        UserError, match=r"--init .*: expected an adapter with prefix_length 4, it has prefix_length 10"
    ):
        run(tiny_model, pictures / "rows.json", tmp_path / "other", replace(still, prefix_length=4))
    with pytest.raises(UserError, match="none"):
        run(tiny_model, pictures / "rows.json", tmp_path / "other", replace(still, init=str(tmp_path / "none")))


def test_conversations_as_llava_writes_them(tmp_path: Path) -> None:
    from llama_adapter_kernels.training.chats import Chat, Turn
    from llama_adapter_kernels.training.data import read_conversations

    (tmp_path / "cat.png").write_bytes(b"")
    turns = [
        {"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "A cat."},
        {"from": "human", "value": "Which colour?\n<image>"}, {"from": "gpt", "value": "Grey."},
    ]  # fmt: skip
    rows = [{"id": "1", "image": "cat.png", "conversations": turns}, {"id": "2", "conversations": turns}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    seen, unseen = read_conversations([tmp_path / "rows.json"])
    assert isinstance(seen, Chat)
    assert seen.image == seen.media == tmp_path / "cat.png"
    assert [turn.content for turn in seen.turns] == ["What is this?", "A cat.", "Which colour?", "Grey."]
    assert unseen.media is None
    assert isinstance(unseen, Chat)
    assert unseen.turns[0] == Turn("user", "<image>\nWhat is this?")  # there is none: the text is the user's own
    (tmp_path / "rows.json").write_text(json.dumps([{"image": "dog.png", "conversations": turns}]))
    with pytest.raises(UserError, match=r'row 1: field "image": no file .*dog\.png'):
        read_conversations([tmp_path / "rows.json"])


def test_encoders_and_rows_must_meet(
    tiny_model: Path, pictures: Path, encoder: Path, rows_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r'row 1: it has "image"; expected --image-encoder'):
        run(tiny_model, pictures / "rows.json", tmp_path / "a")
    with pytest.raises(UserError, match=r'--image-encoder .*: expected rows with "image" in .*, none has it'):
        run(tiny_model, rows_file, tmp_path / "b", settings(encoder))
    with pytest.raises(UserError, match="expected one of them, got both"):
        run(tiny_model, rows_file, tmp_path / "c", replace(settings(encoder), audio_encoder="log-mel"))
    with pytest.raises(UserError, match=r"--image-encoder .*none"):
        run(
            tiny_model,
            pictures / "rows.json",
            tmp_path / "d",
            replace(settings(encoder), image_encoder=str(tmp_path / "none")),
        )
    assert not any((tmp_path / name / "run.json").exists() for name in "abcd")


def test_a_broken_picture_is_named_when_it_is_encoded(
    tiny_model: Path, pictures: Path, encoder: Path, tmp_path: Path
) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    (tmp_path / "rows.json").write_text(json.dumps([{"instruction": "x", "output": "y", "image": "broken.png"}]))
    command = ["encode", "--data", str(tmp_path / "rows.json"), "--features", str(tmp_path / "kept"), "--cpu",
               "--image-encoder", str(encoder)]  # fmt: skip
    result = runner.invoke(app, command)
    assert result.exit_code == 2
    assert "row 1: " in result.output
    assert "not an image" in result.output
    command[2] = str(pictures / "rows.json")
    again = [runner.invoke(app, command).output for _ in range(2)]
    assert "12 rows, 3 files encoded" in again[0]  # by content
    assert "12 rows, 0 files encoded" in again[1]


def test_answers_about_pictures_need_eyes(tiny_model: Path, pictures: Path, tmp_path: Path) -> None:
    from llama_adapter_kernels.models import load_model

    network = load_model(str(tiny_model), torch.float32)
    lak.attach_adapter(network, lak.AdapterConfig()).save_pretrained(tmp_path / "blind")
    command = [
        "generate",
        "--model",
        str(tiny_model),
        "--cpu",
        "--instruction",
        "Which?",
        "--image",
        str(pictures / "0.png"),
    ]
    refused = runner.invoke(app, [*command, "--adapter", str(tmp_path / "blind")])
    assert refused.exit_code == 2
    assert "conditioning for image, this one has no conditioning" in refused.output.replace("\n", " ")
    refused = runner.invoke(app, command)
    assert refused.exit_code == 2
    assert "--image: belongs to an --instruction and an --adapter" in refused.output.replace("\n", " ")
    refused = runner.invoke(app, [*command[:-1], str(tmp_path / "none.png"), "--adapter", str(tmp_path / "blind")])
    assert "no such file" in refused.output
