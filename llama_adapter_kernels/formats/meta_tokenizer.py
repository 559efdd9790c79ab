"""Meta's tokenizer.model as a tokenizer of transformers: sentencepiece up to Llama 2, byte pairs from Llama 3 on."""

import base64
import binascii
from pathlib import Path
from typing import Any

from llama_adapter_kernels.formats.files import clip

_LARGEST = 64 << 20  # bytes; Llama 3's has 2 MB
_SPECIAL = 256  # ids behind Llama 3's byte pairs
_NAMED = {
    0: "begin_of_text", 1: "end_of_text", 6: "start_header_id", 7: "end_header_id", 9: "eot_id",
}  # fmt: skip


def read_tokenizer(path: Path) -> Any:
    """The tokenizer in a tokenizer.model; it puts the beginning-of-sequence token in front, as the models expect.

    Raises:
        OSError: it cannot be read.
        ValueError: it is neither of the two formats.
    """
    size = path.stat().st_size
    if size > _LARGEST:
        raise ValueError(f"{path}: expected at most {_LARGEST} bytes of tokenizer, got {size}")
    content = path.read_bytes()
    first = content.partition(b"\n")[0].split(b" ")
    if len(first) == 2 and first[1].isdigit() and b"\0" not in first[0]:
        return _from_byte_pairs(path, content)
    return _from_sentencepiece(path, content)


def _from_sentencepiece(path: Path, content: bytes) -> Any:
    """Pieces and merges; merges in the order of the pieces' scores, which is the order in which sentencepiece merges.

    The conversion in transformers orders them by id, which differs for runs of spaces, as its own marking of spaces does.
    """
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    model: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    try:
        model.ParseFromString(content)
    except DecodeError as error:
        raise ValueError(f"{path}: expected a sentencepiece model ({clip(error)})") from error
    pieces = [piece.piece for piece in model.pieces]
    if len(pieces) < 3 or len(set(pieces)) != len(pieces) or model.trainer_spec.model_type != 2:
        raise ValueError(f"{path}: expected a sentencepiece model of byte pairs with pieces of different names")
    ids = {piece: number for number, piece in enumerate(pieces)}
    merges = []
    for piece in model.pieces:
        halves = ((piece.piece[:cut], piece.piece[cut:]) for cut in range(1, len(piece.piece)))
        known = [(ids[left], ids[right]) for left, right in halves if left in ids and right in ids]
        merges += [(-piece.score, ids[piece.piece], *pair) for pair in known]
    merges.sort()
    pairs = [(pieces[left], pieces[right]) for _, _, left, right in merges]
    unknown, start, end = pieces[:3]
    backend = Tokenizer(models.BPE(vocab=ids, merges=pairs, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([unknown, start, end])
    backend.post_processor = _in_front(start, 1)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token=unknown, bos_token=start, eos_token=end)


def _in_front(start: str, number: int) -> Any:
    """The token of the beginning in front of each text."""
    from tokenizers import processors

    return processors.TemplateProcessing(
        single=f"{start} $A", pair=f"{start} $A {start} $B", special_tokens=[(start, number)]
    )


def _from_byte_pairs(path: Path, content: bytes) -> Any:
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), 1):
        try:
            token, rank = line.split(b" ")
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise ValueError(
                f"{path}: line {number}: expected bytes in base64 and their rank, got {clip(line)}"
            ) from None
    if sorted(ranks.values()) != list(range(len(ranks))) or not {bytes([byte]) for byte in range(256)} <= ranks.keys():
        raise ValueError(f"{path}: expected every byte, and ranks from 0 without a gap, got {len(ranks)} tokens")

    class Converter(TikTokenConverter):
        @staticmethod
        def load_tiktoken_bpe(tiktoken_url: str) -> dict[bytes, int]:
            return ranks

    reserved = iter(range(_SPECIAL))
    special = [f"<|{_NAMED.get(i) or f'reserved_special_token_{next(reserved)}'}|>" for i in range(_SPECIAL)]
    backend = Converter(vocab_file=str(path), extra_special_tokens=special).converted()
    start = special[0]
    backend.post_processor = _in_front(start, len(ranks))
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=start, eos_token=special[1])
