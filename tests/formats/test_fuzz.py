"""Damaged files of every format: read as they are or refused in a sentence, never another exception, never much memory."""

import random
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llama_adapter_kernels.formats import gguf, litgpt_writing, meta_weights, native, peft
from llama_adapter_kernels.formats.registry import read_adapter
from tests.formats.test_native import state as native_state
from tests.formats.test_torch_file import little_memory
from tests.support import wild_adapters as wild
from tests.support.eager_llama import HEADS, HIDDEN, LAYERS

SMALL = {f"layers.{n}.prompt": torch.randn(5, HIDDEN) for n in (2, 3)}


def peft_state() -> native.AdapterState:
    tensors = SMALL | {f"layers.{n}.gate": torch.randn(1) for n in (2, 3)}
    config = native.AdapterConfig(prefix_length=5, num_layers=2, gate="identity", gate_shape="scalar")
    return native.AdapterState(config, {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS}, tensors)


def litgpt_state() -> native.AdapterState:
    tensors = SMALL | {f"layers.{n}.gate": torch.randn(HEADS) for n in (2, 3)}
    config = native.AdapterConfig(prefix_length=5, num_layers=2, gate="identity")
    base = {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    return native.AdapterState(config, base, tensors)


def torch_file(content: object) -> Callable[[Path], None]:
    return lambda path: torch.save(content, path)


FILES: dict[str, Callable[[Path], None]] = {
    "official-v1": torch_file(wild.v1_file()),
    "official-v2-chat": torch_file(wild.chat_file()),
    "official-v2-multimodal": torch_file({"model": wild.multimodal_file(2), "config": {"w_lora": True}}),
    "imagebind-llm": torch_file({"model": wild.one_prompt_file("imagebind-llm", LAYERS)}),
    "mu-llama": torch_file({"model": wild.one_prompt_file("mu-llama", 3)}),
    "llama2-accessory": torch_file(wild.accessory_file(2, True, False)),
    "litgpt": lambda path: litgpt_writing.write(path, litgpt_state()) and None,
    "safetensors": lambda path: save_file(wild.accessory_file(2, False, False), path),
}  # fmt: skip
FOLDERS = {
    "native": (lambda path: native.write(path, native_state()), (native.CONFIG_FILE, native.WEIGHTS_FILE)),
    "peft": (lambda path: peft.write(path, peft_state()), (peft.CONFIG_FILE, peft.WEIGHTS_FILE)),
}


def damaged(content: bytes, seed: int) -> list[bytes]:
    """The content cut off at every 5 %, and with bytes flipped in it: a few anywhere, some where the structure is."""
    chance = random.Random(seed)
    cut = [content[: len(content) * percent // 100] for percent in range(0, 100, 5)]
    flipped = []
    for number in range(60):
        changed = bytearray(content)
        ends = (0, min(len(content), 3000)) if number % 3 == 0 else (max(0, len(content) - 3000), len(content))
        for _ in range(chance.choice((1, 1, 3))):
            place = chance.randrange(*ends) if number % 3 < 2 else chance.randrange(len(content))
            changed[place] ^= 1 << chance.randrange(8)
        flipped.append(bytes(changed))
    return cut + flipped


def read_or_refuse(path: Path, where: str) -> bool:
    """Reads an adapter; whether that went well. Whatever else than an adapter or a sentence comes is an error here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sentence = refusal(read_adapter, path)
    assert len(sentence) < 1500, where
    return not sentence


def refusal(action: Callable[..., object], *arguments: object) -> str:
    """What an action refuses with; empty where it does not. Whatever else it raises is an error of the test."""
    try:
        action(*arguments)
    except (ValueError, OSError) as error:
        return str(error) or repr(error)
    return ""


@pytest.mark.parametrize("kind", FILES)
def test_damaged_files(tmp_path: Path, kind: str) -> None:
    path = tmp_path / ("file.safetensors" if kind == "safetensors" else "file.pth")
    FILES[kind](path)
    content = path.read_bytes()
    assert read_or_refuse(path, kind)
    with little_memory():
        for number, changed in enumerate(damaged(content, 1)):
            path.write_bytes(changed)
            good = read_or_refuse(path, f"{kind} {number}")
            assert not (good and number < 20), f"{kind}: cut off at {5 * number} % and read"


@pytest.mark.parametrize("kind", FOLDERS)
def test_damaged_folders(tmp_path: Path, kind: str) -> None:
    write, names = FOLDERS[kind]
    write(tmp_path / "folder")
    assert read_or_refuse(tmp_path / "folder", kind)
    with little_memory():
        for name in names:
            path = tmp_path / "folder" / name
            content = path.read_bytes()
            for number, changed in enumerate(damaged(content, 2)):
                path.write_bytes(changed)
                good = read_or_refuse(tmp_path / "folder", f"{kind} {name} {number}")
                assert not (good and number < 20), f"{kind} {name}: cut off at {5 * number} % and read"
            path.write_bytes(content)


def test_damaged_shards_of_meta(tmp_path: Path) -> None:
    from tests.formats.test_meta_weights import LLAMA_1, write_shards
    from tests.support.eager_llama import small_llama

    write_shards(tmp_path / "meta", small_llama(), 1, LLAMA_1)
    for name, every in (("consolidated.00.pth", 3), ("params.json", 1)):
        path = tmp_path / "meta" / name
        content = path.read_bytes()
        for number, changed in enumerate(damaged(content, 3)[::every]):
            path.write_bytes(changed)
            if refusal(meta_weights.convert, tmp_path / "meta", tmp_path / f"{name}{number}"):
                assert not (tmp_path / f"{name}{number}").exists()
        path.write_bytes(content)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_damaged_headers_of_gguf(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    from tests.formats.test_gguf import small_file

    path = tmp_path / "file.gguf"
    small_file(path)
    content = path.read_bytes()
    gguf.read_header(path)
    with little_memory():
        for number, changed in enumerate(damaged(content, 4)):
            path.write_bytes(changed)
            sentence = refusal(gguf.read_header, path)
            assert len(sentence) < 700
            assert sentence or number >= 20, f"cut off at {5 * number} % and read"
