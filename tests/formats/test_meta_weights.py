"""Meta's base models become Hugging Face folders with the same logits, in the memory of a shard and a layer."""

import base64
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from llama_adapter_kernels.formats import meta_weights
from llama_adapter_kernels.formats.meta_tokenizer import read_tokenizer
from tests.support.eager_llama import (
    HEADS,
    HIDDEN,
    LAYERS,
    TOKENS,
    VOCABULARY,
    small_llama,
    weights_of_meta,
)

SPLIT = {"tok_embeddings": 1, "attention.wo": 1, "feed_forward.w2": 1}
LLAMA_1: dict[str, Any] = {
    "dim": HIDDEN,
    "n_layers": LAYERS,
    "n_heads": HEADS,
    "norm_eps": 1e-5,
    "vocab_size": -1,
    "multiple_of": 8,
}
LLAMA_3: dict[str, Any] = LLAMA_1 | {
    "n_kv_heads": 2,
    "rope_theta": 10000.0,
    "vocab_size": VOCABULARY,
    "ffn_dim_multiplier": 1.3,
}


def write_shards(
    folder: Path, model: nn.Module, shards: int, parameters: dict[str, Any], embeddings_along: int = 1
) -> None:
    """A folder as Meta distributes it, of a model in float64."""
    folder.mkdir()
    pieces: list[dict[str, Tensor]] = [{"rope.freqs": torch.ones(4)} for _ in range(shards)]
    for name, weight in weights_of_meta(model).items():
        kind = name.split(".", 2)[-1]
        along = embeddings_along if kind == "tok_embeddings" else SPLIT.get(kind, 0)
        parts = [weight] * shards if weight.dim() == 1 else weight.chunk(shards, dim=along)
        for piece, part in zip(pieces, parts, strict=True):
            piece[f"{name}.weight"] = part.clone()
    for number, piece in enumerate(pieces):
        torch.save(piece, folder / f"consolidated.{number:02d}.pth")
    (folder / "params.json").write_text(json.dumps(parameters))


def test_eight_shards_as_65b_has_them(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=8, rms_norm_eps=1e-5, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).double().eval()
    write_shards(tmp_path / "meta", model, 8, LLAMA_1 | {"dim": 64, "n_layers": 2, "n_heads": 8})
    meta_weights.convert(tmp_path / "meta", tmp_path / "new")
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "new", dtype="auto")
    assert torch.equal(written(TOKENS).logits, model(TOKENS).logits)


def test_shards_that_cut_heads_are_refused(tmp_path: Path) -> None:
    write_shards(tmp_path / "meta", small_llama(), 8, LLAMA_1)
    with pytest.raises(ValueError, match="4 and 4 heads do not divide over 8 shards"):
        meta_weights.convert(tmp_path / "meta", tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("shards", "groups", "along"), [(1, HEADS, 1), (2, HEADS, 1), (4, HEADS, 1), (2, 2, 0)])
def test_logits_are_those_of_the_shards(tmp_path: Path, shards: int, groups: int, along: int) -> None:
    model = small_llama(groups)
    write_shards(tmp_path / "meta", model, shards, LLAMA_1 if groups == HEADS else LLAMA_3, along)
    steps: list[tuple[int, int, str]] = []
    notes = meta_weights.convert(
        tmp_path / "meta", tmp_path / "new" / "model", progress=lambda *step: steps.append(step)
    )
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "new" / "model", dtype="auto")
    assert written.dtype == torch.float64
    for (name, ours), theirs in zip(written.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    assert torch.equal(written(TOKENS).logits, model(TOKENS).logits)
    assert steps[0] == (0, LAYERS + 1, "layer 0")
    assert steps[-1] == (LAYERS + 1, LAYERS + 1, "")
    assert any("no tokenizer.model" in note for note in notes)
    assert any("Llama 2: sequences of up to 4096 tokens" in note for note in notes)
    assert written.config.max_position_embeddings == 4096


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"norm_eps": 1e-6}, {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6}),
        ({"rope_theta": 500000.0}, {"max_position_embeddings": 8192}),
        ({"rope_theta": 500000.0, "use_scaled_rope": True}, {"max_position_embeddings": 131072}),
        ({"rope_theta": 1e6}, {"max_position_embeddings": 16384}),
    ],
    ids=["1", "3", "3.1", "code"],
)
def test_generations(tmp_path: Path, change: dict[str, Any], expected: dict[str, Any]) -> None:
    write_shards(tmp_path / "meta", small_llama(), 1, LLAMA_1 | change)
    meta_weights.convert(tmp_path / "meta", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert {name: config[name] for name in expected} == expected
    assert config["rope_parameters"]["rope_theta"] == change.get("rope_theta", 10000.0)
    assert config["rope_parameters"]["rope_type"] == ("llama3" if "use_scaled_rope" in change else "default")
    meta_weights.convert(tmp_path / "meta", tmp_path / "longer", positions=77)
    assert json.loads((tmp_path / "longer" / "config.json").read_text())["max_position_embeddings"] == 77


def test_sentencepiece_tokenizers_agree_on_every_text(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    model = Path(__file__).parents[3] / "shared" / "data" / "llama_tokenizer.model"
    if not model.exists():
        pytest.skip("Llama's tokenizer.model is not at hand")
    read_tokenizer(model).save_pretrained(tmp_path)
    ours, theirs = AutoTokenizer.from_pretrained(tmp_path), sentencepiece.SentencePieceProcessor(str(model))
    texts = [
        "", " ", "  two spaces", "a  b", "a" + " " * 40 + "b", "\t\ttab", "line\r\n\r\nend ", "x" * 99, "12345", "é 你好 🦙",
        "    def f(x):\n        return x\n", Path(__file__).read_text(),
    ]  # fmt: skip
    for text in texts:
        assert ours(text)["input_ids"] == [1, *theirs.encode(text)], text
        assert ours.decode(ours(text)["input_ids"], skip_special_tokens=True) == text
    assert (ours.bos_token_id, ours.eos_token_id, ours.unk_token_id, len(ours)) == (1, 2, 0, 32000)


def test_llama_3_tokenizers(tmp_path: Path) -> None:
    tokens = [bytes([byte]) for byte in range(256)] + [b"he", b"ll", b"hell", b"hello", b" w", b" wo"]
    lines = [base64.b64encode(token) + f" {rank}".encode() for rank, token in enumerate(tokens)]
    (tmp_path / "tokenizer.model").write_bytes(b"\n".join(lines) + b"\n")
    read_tokenizer(tmp_path / "tokenizer.model").save_pretrained(tmp_path / "out")
    ours = AutoTokenizer.from_pretrained(tmp_path / "out")
    start = len(tokens)
    assert ours("hello wo")["input_ids"] == [start, 259, 261]
    assert ours("é<|eot_id|>")["input_ids"] == [start, 0xC3, 0xA9, start + 9]
    assert ours.decode(ours("hello\n é")["input_ids"], skip_special_tokens=True) == "hello\n é"
    assert (ours.bos_token_id, ours.eos_token_id, len(ours)) == (start, start + 1, start + 256)
    for bad in (b"aGU= 0\nnothing\n", b"!!! 0\n", b"aGU= 5\n"):
        (tmp_path / "tokenizer.model").write_bytes(bad)
        with pytest.raises(ValueError, match=r"tokenizer\.model: (line \d|expected every byte)"):
            read_tokenizer(tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer.model").write_bytes(bytes(range(256)))
    with pytest.raises(ValueError, match=r"tokenizer\.model: expected a sentencepiece model"):
        read_tokenizer(tmp_path / "tokenizer.model")


def gap(folder: Path) -> None:
    shutil.copy(folder / "consolidated.00.pth", folder / "consolidated.03.pth")


def change_parameters(**change: Any) -> Any:
    return lambda folder: (folder / "params.json").write_text(json.dumps({**LLAMA_1, **change}))


def change_shard(number: int, **change: Tensor | None) -> Any:
    def apply(folder: Path) -> None:
        path = folder / f"consolidated.{number:02d}.pth"
        content = torch.load(path, weights_only=True)
        for name, value in change.items():
            key = name.replace("__", ".") + ".weight"
            content.pop(key) if value is None else content.update({key: value})
        torch.save(content, path)

    return apply


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change_parameters(n_layers=5), r"expected the 5 layers of params\.json; missing keys: layers\.4\.attention\.wk"),
        (change_parameters(n_layers=3), r"the 3 layers of params\.json; .*unknown keys: layers\.3\.attention\.wk.*wv"),
        (change_parameters(dim=64), r"expected shape \[\d+, 64\] .* by params\.json and 2 shards, got \[\d+, 32\]"),
        (change_parameters(n_kv_heads=2), r"attention\.wk\.weight: expected shape \[8, 32\] .*, got \[16, 32\]"),
        (change_parameters(n_heads=3), "expected whole heads of an even size, got dim 32, n_heads 3"),
        (change_parameters(n_layers=10**12), "n_layers: expected a whole number in range, got 1000000000000"),
        (change_parameters(dim="32"), "dim: expected a whole number in range, got '32'"),
        (change_parameters(norm_eps=True), "norm_eps: expected a number above 0, got True"),
        (change_parameters(moe={"num_experts": 8}), "a Llama 1, 2 or 3 text model, got also moe"),
        (lambda folder: (folder / "params.json").unlink(), r"params\.json"),
        (gap, r"those that follow without a gap, got .*consolidated\.03\.pth"),
        (change_shard(1, norm=None), r"consolidated\.01\.pth: .*missing keys: norm\.weight"),
        (change_shard(1, layers__0__bias=torch.ones(3)), r"unknown keys: layers\.0\.bias\.weight"),
        (change_shard(1, norm=torch.ones(HIDDEN).double()), r"norm\.weight: expected the same in every shard"),
        (change_shard(0, norm=torch.ones(HIDDEN).half()), r"norm\.weight: expected .* in torch\.float64 .*float16"),
        (lambda folder: (folder / "consolidated.01.pth").write_bytes(b"PK\3\4 nothing"), r"01\.pth: expected a file of"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named_and_nothing_is_written(tmp_path: Path, damage: Any, message: str) -> None:
    write_shards(tmp_path / "meta", small_llama(), 2, LLAMA_1)
    damage(tmp_path / "meta")
    with pytest.raises((ValueError, OSError), match=message):
        meta_weights.convert(tmp_path / "meta", tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["meta"]


def test_an_interruption_or_a_folder_in_the_way_leaves_all_as_it_was(tmp_path: Path) -> None:
    write_shards(tmp_path / "meta", small_llama(), 1, LLAMA_1)

    def interrupt(done: int, total: int, name: str) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        meta_weights.convert(tmp_path / "meta", tmp_path / "model", progress=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["meta"]
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine").write_text("kept")
    with pytest.raises(FileExistsError, match="expected a new folder, there is something already"):
        meta_weights.convert(tmp_path / "meta", tmp_path / "model")
    assert (tmp_path / "model" / "mine").read_text() == "kept"


MEASURE = """
import sys
from pathlib import Path
import torch, transformers, safetensors.torch
from llama_adapter_kernels.formats import meta_weights

def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024

warm_up, folder, target = map(Path, sys.argv[1:])
meta_weights.convert(warm_up, target / "first")  # so that imports and the like are not counted
before = peak()
meta_weights.convert(folder, target / "second")
print(peak() - before)
"""


def test_memory_stays_at_a_shard_and_a_layer(tmp_path: Path) -> None:
    write_shards(tmp_path / "small", small_llama(), 1, LLAMA_1)
    hidden, ffn, layers, shards, vocabulary = 1024, 4096, 6, 2, 512
    folder = tmp_path / "large"
    folder.mkdir()
    shapes = {
        "attention.wq": (hidden // shards, hidden), "attention.wk": (hidden // shards, hidden),
        "attention.wv": (hidden // shards, hidden), "attention.wo": (hidden, hidden // shards),
        "feed_forward.w1": (ffn // shards, hidden), "feed_forward.w2": (hidden, ffn // shards),
        "feed_forward.w3": (ffn // shards, hidden), "attention_norm": (hidden,), "ffn_norm": (hidden,),
    }  # fmt: skip
    for shard in range(shards):
        content = {
            f"layers.{n}.{name}.weight": torch.ones(shape) for n in range(layers) for name, shape in shapes.items()
        }
        content |= {"norm.weight": torch.ones(hidden), "output.weight": torch.ones(vocabulary // shards, hidden)}
        content["tok_embeddings.weight"] = torch.ones(vocabulary, hidden // shards)
        torch.save(content, folder / f"consolidated.{shard:02d}.pth")
    (folder / "params.json").write_text(json.dumps(LLAMA_1 | {"dim": hidden, "n_layers": layers, "n_heads": 8}))
    del content
    layer = 4 * (4 * hidden * hidden + 3 * hidden * ffn)
    shard = (folder / "consolidated.00.pth").stat().st_size
    used = int(
        subprocess.run(
            [sys.executable, "-c", MEASURE, tmp_path / "small", folder, tmp_path],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    )
    print(f"layer {layer / 2**20:.0f} MiB, shard {shard / 2**20:.0f} MiB, more at the peak {used / 2**20:.0f} MiB")
    assert used < shard + layer
