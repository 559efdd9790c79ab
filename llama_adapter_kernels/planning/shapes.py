"""The sizes of a Llama-like model, from its config.json alone."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_adapter_kernels.errors import UserError

# Configurations that need no file. Sources: arXiv 2302.13971 (LLaMA), the models' own config.json.
BUILTIN: dict[str, dict[str, Any]] = {
    "llama-7b": {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "vocab_size": 32000,
    },
    "llama-13b": {
        "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40,
        "vocab_size": 32000,
    },
    "llama-3-8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256,
    },
    "smollm2-135m": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
    },
}  # fmt: skip
_NEEDED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
_OTHER_LAYERS = ("num_local_experts", "num_experts", "n_routed_experts", "kv_lora_rank", "state_size")


@dataclass(frozen=True)
class ModelShape:
    """A decoder of layers with four attention projections and a gated feed-forward part of three."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool = False

    @property
    def attention_weights(self) -> int:
        """Of a layer: query, key, value and output projection."""
        return 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)

    @property
    def inner_weights(self) -> int:
        """Of a layer: gate, up and down projection."""
        return 3 * self.hidden * self.inner

    @property
    def parameters(self) -> int:
        """All weights, norms and embeddings counted; biases are not."""
        layer = self.attention_weights + self.inner_weights + 2 * self.hidden
        return self.layers * layer + self.hidden + self.hidden * self.vocabulary * (1 if self.tied else 2)


def read_shape(name: str) -> ModelShape:
    """The shape of a builtin model, of a config.json, or of a folder with one.

    Raises:
        UserError: there is no such file, or it is not that of a Llama-like model.
    """
    if name in BUILTIN:
        return shape_of(BUILTIN[name], name)
    path = Path(name)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        known = ", ".join(BUILTIN)
        raise UserError(f"--model {name}: no such file; expected a config.json, a folder with one, or one of {known}")
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"--model {name}: {path.name} cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"--model {name}: expected a JSON object, got a {type(config).__name__}")
    return shape_of(config.get("text_config", config), name)


def shape_of(config: dict[str, Any], name: str) -> ModelShape:
    """The shape that a configuration describes; `name` is for messages.

    Raises:
        UserError: a number is missing or no count, or the layers are of another kind.
    """
    for key in _OTHER_LAYERS:
        if config.get(key):
            raise UserError(f"--model {name}: expected a Llama-like model, got one with {key}")
    numbers = {key: config.get(key) for key in _NEEDED}
    numbers["num_key_value_heads"] = config.get("num_key_value_heads") or numbers["num_attention_heads"]
    heads = numbers["num_attention_heads"]
    if config.get("head_dim") is not None or not (isinstance(heads, int) and heads > 0):
        numbers["head_dim"] = config.get("head_dim")
    for key, value in numbers.items():
        if type(value) is not int or not 0 < value < 10**9:
            raise UserError(f"--model {name}: {key}: expected a count in a Llama-like configuration, got {value!r:.80}")
    found = {key: int(value) for key, value in numbers.items() if value is not None}
    return ModelShape(
        hidden=found["hidden_size"], inner=found["intermediate_size"], layers=found["num_hidden_layers"],
        heads=found["num_attention_heads"], kv_heads=found["num_key_value_heads"],
        head_dim=found.get("head_dim", found["hidden_size"] // found["num_attention_heads"]),
        vocabulary=found["vocab_size"], tied=bool(config.get("tie_word_embeddings", False)),
    )  # fmt: skip
