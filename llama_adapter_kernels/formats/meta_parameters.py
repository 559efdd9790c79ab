"""The params.json of Meta's Llama models: the sizes of one, and which generation it is."""

from dataclasses import dataclass
from pathlib import Path

from llama_adapter_kernels.formats.files import clip, listed, read_json

_LARGEST = {"n_layers": 4096, "n_heads": 65536, "n_kv_heads": 65536}  # Llama 405B: 126, 128, 8
_KNOWN_PARAMETERS = {
    "dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "ffn_dim_multiplier", "norm_eps", "rope_theta",
    "use_scaled_rope", "max_seq_len", "max_batch_size",
}  # fmt: skip


@dataclass(frozen=True)
class Parameters:
    """A params.json: sizes of the model. Llama 1 has neither n_kv_heads nor rope_theta."""

    hidden_size: int
    layers: int
    heads: int
    groups: int
    epsilon: float
    theta: float
    scaled_rope: bool

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.heads


def read_parameters(path: Path) -> Parameters:
    """The sizes in a params.json.

    Raises:
        OSError: it cannot be read.
        ValueError: a number is missing, none, or out of range.
    """
    told = read_json(path)

    def number(name: str, default: int | None = None) -> int:
        value = told.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _LARGEST.get(name, 1 << 24):
            raise ValueError(f"{path}: {name}: expected a whole number in range, got {clip(repr(value))}")
        return value

    def real(name: str, default: float | None = None) -> float:
        value = told.get(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e12:
            raise ValueError(f"{path}: {name}: expected a number above 0, got {clip(repr(value))}")
        return float(value)

    heads = number("n_heads")
    found = Parameters(
        number("dim"), number("n_layers"), heads, number("n_kv_heads", heads), real("norm_eps"), real("rope_theta", 10000.0),
        told.get("use_scaled_rope", False) is True,
    )  # fmt: skip
    if found.hidden_size % found.heads or found.head_dim % 2 or found.heads % found.groups:
        raise ValueError(
            f"{path}: expected whole heads of an even size, got dim {found.hidden_size}, n_heads {found.heads}, "
            f"n_kv_heads {found.groups}"
        )
    foreign = told.keys() - _KNOWN_PARAMETERS
    if foreign:  # mixtures of experts, vision, quantisation: other models than this writes
        raise ValueError(
            f"{path}: expected the parameters of a Llama 1, 2 or 3 text model, got also {listed(sorted(foreign))}"
        )
    return found


def generation(parameters: Parameters) -> tuple[str, int]:
    """Which Llama this is, by what its params.json tells apart, and its longest sequence."""
    if parameters.scaled_rope:
        return "Llama 3.1", 131072
    if parameters.theta == 500000:
        return "Llama 3", 8192
    if parameters.theta == 1e6:
        return "Code Llama", 16384
    return ("Llama 1", 2048) if parameters.epsilon == 1e-6 else ("Llama 2", 4096)
