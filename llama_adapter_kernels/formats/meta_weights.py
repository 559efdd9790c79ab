"""Base models as Meta distributes them, written as a Hugging Face folder.

consolidated.00.pth (and one more for each further GPU the model was split over), params.json and tokenizer.model become
config.json, one safetensors file per layer and a tokenizer. A layer is put together at a time: in memory are what one shard
has of it and the whole of it.
"""

import errno
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama_adapter_kernels.formats.files import clip, listed, new_folder, refuse_existing
from llama_adapter_kernels.formats.meta_names import LINEARS, NORMS, rows_in_halves
from llama_adapter_kernels.formats.meta_parameters import Parameters, generation, read_parameters
from llama_adapter_kernels.formats.meta_tokenizer import read_tokenizer
from llama_adapter_kernels.formats.torch_file import TensorRecord, TorchFile

_DIMENSIONS = {"attention.wo": 1, "feed_forward.w2": 1}  # the side on which a linear is split; 0 for the others
_MOST_SHARDS = 64
Progress = Callable[[int, int, str], None]


def is_meta_folder(path: Path) -> bool:
    """The folder `path` is one of Meta's."""
    return path.is_dir() and (path / "params.json").is_file() and any(path.glob("consolidated.*.pth"))


def convert(
    source: Path, target: Path, positions: int | None = None, progress: Progress | None = None
) -> tuple[str, ...]:
    """Writes the model in `source` to the new folder `target`, in the dtype that it has.

    Args:
        positions: longest sequence; params.json does not tell. None: by the generation of the model.
        progress: called with pieces done, pieces in all, and the next one's name.

    Returns:
        Notes on what was decided.

    Raises:
        OSError: something cannot be read or written, or `target` is there already. Nothing of it is left then.
        ValueError: the files do not fit each other; the message gives both sides.
    """
    parameters = read_parameters(source / "params.json")
    shards = _open_shards(source)
    refuse_existing(target)
    sizes = _check(source, parameters, shards)
    with new_folder(target) as folder:
        _expect_room(folder, shards)
        tokenizer, notes = _tokenizer(source, sizes["vocabulary"])
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        config, more = _config(parameters, sizes, positions, tokenizer, shards[0])
        config.save_pretrained(folder)
        _write_weights(folder, parameters, shards, progress or (lambda done, total, name: None))
    return (*notes, *more)


def _open_shards(source: Path) -> list[TorchFile]:
    paths = sorted(source.glob("consolidated.*.pth"))
    expected = [f"consolidated.{i:02d}.pth" for i in range(len(paths))]
    if not paths or len(paths) > _MOST_SHARDS or [path.name for path in paths] != expected:
        names = listed(path.name for path in paths) or "none"
        raise ValueError(f"{source}: expected consolidated.00.pth and those that follow without a gap, got {names}")
    return [TorchFile(path) for path in paths]


def _names(parameters: Parameters) -> dict[str, dict[str, str]]:
    """For every piece of the result: the names of its tensors in the result, by their names in the shards."""
    pieces = {}
    for layer in range(parameters.layers):
        names = {
            f"layers.{layer}.{meta}.weight": f"model.layers.{layer}.{name}.weight" for meta, name in LINEARS.items()
        }
        names |= {
            f"layers.{layer}.{meta}.weight": f"model.layers.{layer}.{name}.weight" for meta, name in NORMS.items()
        }
        pieces[f"layer {layer}"] = names
    ends = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
    return pieces | {"embeddings": {f"{meta}.weight": f"{name}.weight" for meta, name in ends.items()}}


def _check(source: Path, parameters: Parameters, shards: Sequence[TorchFile]) -> dict[str, int]:
    """Every shard has every tensor in the shape that params.json and the number of shards ask for.

    Returns:
        The sizes that params.json leaves open: of the vocabulary and the feed-forward layer.
    """
    expected = {name for names in _names(parameters).values() for name in names}
    for shard in shards:
        if not isinstance(shard.content, dict):
            raise ValueError(f"{shard.path}: expected a dictionary of tensors")
        ignored = {name for name in shard.content if str(name) == "rope.freqs"}
        missing, more = expected - shard.content.keys(), shard.content.keys() - expected - ignored
        if missing or more:
            lacks, has = listed(sorted(missing)) or "none", listed(sorted(map(str, more)), every=True) or "none"
            layers = f"the {parameters.layers} layers of params.json"
            raise ValueError(f"{shard.path}: expected {layers}; missing keys: {lacks}; unknown keys: {has}")
        wrong = [name for name in expected if not isinstance(shard.content[name], TensorRecord)]
        if wrong:
            raise ValueError(f"{shard.path}: {clip(wrong[0])}: expected a tensor")
    first, count = shards[0].content, len(shards)
    vocabulary_at, embeddings = first["output.weight"].shape, first["tok_embeddings.weight"].shape
    ffn_at = first["layers.0.feed_forward.w1.weight"].shape
    if len(vocabulary_at) != 2 or len(ffn_at) != 2 or len(embeddings) != 2:
        raise ValueError(f"{source}: expected matrices, got shapes {vocabulary_at}, {ffn_at}, {embeddings}")
    sizes = {"vocabulary": vocabulary_at[0] * count, "ffn": ffn_at[0] * count}
    shapes = _shapes(parameters, sizes, count, split_vocabulary=embeddings[0] != sizes["vocabulary"] or count == 1)
    for shard in shards:
        for name in sorted(expected):
            record, shape = shard.content[name], shapes[name.removesuffix(".weight").split(".", 2)[-1]]
            if (
                record.shape != shape
                or record.dtype != first["output.weight"].dtype
                or not record.dtype.is_floating_point
            ):
                raise ValueError(
                    f"{shard.path}: {name}: expected shape {list(shape)} in {first['output.weight'].dtype} by params.json "
                    f"and {count} shards, got {clip(list(record.shape))} in {record.dtype}"
                )
    return sizes


def _shapes(
    parameters: Parameters, sizes: Mapping[str, int], count: int, split_vocabulary: bool
) -> dict[str, tuple[int, ...]]:
    """Shapes of a shard's tensors by their names without the layer. Llama 3 splits its embeddings by rows."""
    hidden, ffn, vocabulary = parameters.hidden_size, sizes["ffn"] // count, sizes["vocabulary"]
    queries, keys = parameters.heads * parameters.head_dim, parameters.groups * parameters.head_dim
    # Whole heads: the rows of a head are put in another order.
    if parameters.heads % count or parameters.groups % count or hidden % count:
        raise ValueError(
            f"params.json: {parameters.heads} and {parameters.groups} heads do not divide over {count} shards"
        )
    return {
        "attention.wq": (queries // count, hidden), "attention.wk": (keys // count, hidden),
        "attention.wv": (keys // count, hidden), "attention.wo": (hidden, queries // count),
        "feed_forward.w1": (ffn, hidden), "feed_forward.w2": (hidden, ffn), "feed_forward.w3": (ffn, hidden),
        "attention_norm": (hidden,), "ffn_norm": (hidden,), "norm": (hidden,), "output": (vocabulary // count, hidden),
        "tok_embeddings": (vocabulary // count, hidden) if split_vocabulary else (vocabulary, hidden // count),
    }  # fmt: skip


def _expect_room(folder: Path, shards: Sequence[TorchFile]) -> None:
    needed, free = sum(shard.path.stat().st_size for shard in shards), shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            errno.ENOSPC, f"expected {needed / 1e9:.1f} GB of free disk, got {free / 1e9:.1f} GB", str(folder.parent)
        )


def _write_weights(folder: Path, parameters: Parameters, shards: Sequence[TorchFile], progress: Progress) -> None:
    from safetensors.torch import save_file

    pieces = _names(parameters)
    index: dict[str, str] = {}
    total = 0
    for number, (piece, names) in enumerate(pieces.items()):
        progress(number, len(pieces), piece)
        file = f"model-{number + 1:05d}-of-{len(pieces):05d}.safetensors"
        tensors = _joined(shards, names, parameters)
        save_file(tensors, folder / file, {"format": "pt"})
        index |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    progress(len(pieces), len(pieces), "")
    facts = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(facts, indent=2) + "\n")


def _joined(shards: Sequence[TorchFile], names: Mapping[str, str], parameters: Parameters) -> dict[str, Tensor]:
    """The tensors of one piece, whole. Of one shard after the other its part is in memory."""
    whole: dict[str, Tensor] = {}
    for place, shard in enumerate(shards):
        parts = shard.tensors((), names)
        for meta, name in names.items():
            part = parts.pop(meta)
            kind = meta.removesuffix(".weight").split(".", 2)[-1]
            if kind in ("attention.wq", "attention.wk"):
                part = rows_in_halves(part, parameters.head_dim)
            split = part.dim() == 2 and len(shards) > 1
            if not split:
                if place and not torch.equal(whole[name], part):
                    raise ValueError(f"{shard.path}: {meta}: expected the same in every shard, got different values")
                whole[name] = part
                continue
            along = _DIMENSIONS.get(kind, 0)
            if kind == "tok_embeddings":
                along = 0 if part.shape[1] == parameters.hidden_size else 1
            if not place:
                shape = [size * (len(shards) if side == along else 1) for side, size in enumerate(part.shape)]
                whole[name] = torch.empty(shape, dtype=part.dtype)
            whole[name].narrow(along, place * part.shape[along], part.shape[along]).copy_(part)
    return whole


def _tokenizer(source: Path, vocabulary: int) -> tuple[Any, tuple[str, ...]]:
    """The tokenizer beside the shards or, as Llama 1 is distributed, in the folder above them."""
    for folder in (source, source.resolve().parent):
        path = folder / "tokenizer.model"
        if path.is_file():
            tokenizer = read_tokenizer(path)
            if len(tokenizer) > vocabulary:
                raise ValueError(
                    f"{path}: {len(tokenizer)} tokens, the model has {vocabulary}: expected at most as many"
                )
            return tokenizer, (f"tokenizer: {path}",)
    return None, ("no tokenizer.model here or in the folder above: the folder written has no tokenizer",)


def _config(
    parameters: Parameters, sizes: Mapping[str, int], positions: int | None, tokenizer: Any, shard: TorchFile
) -> tuple[Any, tuple[str, ...]]:
    from transformers import LlamaConfig

    name, longest = generation(parameters)
    notes = () if positions else (f"{name}: sequences of up to {longest} tokens; params.json does not tell",)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": parameters.theta}
    if parameters.scaled_rope:  # the same factors for every 3.1 model
        rope = {
            "rope_type": "llama3", "rope_theta": parameters.theta, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        }  # fmt: skip
    config = LlamaConfig(
        vocab_size=sizes["vocabulary"], hidden_size=parameters.hidden_size, intermediate_size=sizes["ffn"],
        num_hidden_layers=parameters.layers, num_attention_heads=parameters.heads, num_key_value_heads=parameters.groups,
        head_dim=parameters.head_dim, rms_norm_eps=parameters.epsilon, max_position_embeddings=positions or longest,
        rope_parameters=rope, tie_word_embeddings=False, architectures=["LlamaForCausalLM"],
        bos_token_id=1 if tokenizer is None else tokenizer.bos_token_id,
        eos_token_id=2 if tokenizer is None else tokenizer.eos_token_id,
        dtype=shard.content["output.weight"].dtype,
    )  # fmt: skip
    return config, notes
