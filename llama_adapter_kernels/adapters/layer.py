"""LLaMA-Adapter's parameters: a learned prompt and a gate per adapted layer, and their files.

Source: arXiv 2303.16199. A layer's prompt [P, hidden] goes through the layer's own key and value projection and becomes
the prefix of its attention; the gate, zero at first, decides how much of it is added.
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from llama_adapter_kernels.adapters.prefix_cache import Prefix, PrefixCache, inference_settings
from llama_adapter_kernels.ops.registration import accumulator_dtype

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter.safetensors"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class AdapterConfig:
    """What an adapter looks like.

    Args:
        prefix_length: P, learned prompt tokens per layer.
        num_layers: adapt the last `num_layers` layers; None: all of them.
        layers: or exactly these (numbers from 0). Not together with num_layers.
        gate: "tanh" (the paper: tanh(g) multiplies) or "identity" (g itself, as PEFT does).
        gate_shape: "head" (one gate per query head) or "scalar" (one per layer).

    Raises:
        ValueError: a field is out of range.
    """

    prefix_length: int = 10
    num_layers: int | None = None
    layers: tuple[int, ...] | None = None
    gate: str = "tanh"
    gate_shape: str = "head"

    def __post_init__(self) -> None:
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(self.layers))
        if self.prefix_length < 1:
            raise ValueError(f"prefix_length: expected at least 1, got {self.prefix_length}")
        if self.num_layers is not None and self.layers is not None:
            raise ValueError("num_layers, layers: expected one of them, got both")
        if self.gate not in ("tanh", "identity"):
            raise ValueError(f"gate: expected tanh or identity, got {self.gate!r}")
        if self.gate_shape not in ("head", "scalar"):
            raise ValueError(f"gate_shape: expected head or scalar, got {self.gate_shape!r}")

    def layer_numbers(self, total: int) -> tuple[int, ...]:
        """The adapted layers of a model with `total` layers, in order.

        Raises:
            ValueError: the model has fewer layers than asked for.
        """
        if self.layers is not None:
            wrong = [layer for layer in self.layers if not 0 <= layer < total]
            if wrong or not self.layers or len(set(self.layers)) != len(self.layers):
                raise ValueError(f"layers: expected different numbers from 0 to {total - 1}, got {list(self.layers)}")
            return tuple(sorted(self.layers))
        count = total if self.num_layers is None else self.num_layers
        if not 1 <= count <= total:
            raise ValueError(f"num_layers: expected 1 to {total} (the layers of the model), got {count}")
        return tuple(range(total - count, total))


class AdapterLayer(nn.Module):
    """Prompt [P, hidden] and gate ([heads] or [1]) of one layer, float32 whatever the model's dtype is."""

    def __init__(self, config: AdapterConfig, hidden_size: int, num_heads: int, device: torch.device) -> None:
        super().__init__()
        gates = num_heads if config.gate_shape == "head" else 1
        self.num_heads = num_heads
        self.prompt = nn.Parameter(torch.randn(config.prefix_length, hidden_size, device=device, dtype=torch.float32))
        self.gate = nn.Parameter(torch.zeros(gates, device=device, dtype=torch.float32))
        self.activation = config.gate
        self._cache = PrefixCache()

    def effective_gate(self) -> Tensor:
        """What multiplies the prefix branch: tanh(gate) or gate, [heads] or [1], float32."""
        return torch.tanh(self.gate) if self.activation == "tanh" else self.gate

    def prefix(
        self,
        project: Callable[[Tensor], tuple[Tensor, Tensor]],
        sources: Callable[[], Sequence[Tensor] | None],
        query: Tensor,
    ) -> Prefix:
        """(prefix_key, prefix_value [1, Hkv, P, D], gate [1, Hq]) of this layer, for attention with `query`.

        Args:
            project: from the prompt, in query's dtype, to prefix_key and prefix_value.
            sources: the tensors behind `project`; None if more than tensors decides about its results.
            query: [B, Hq, Sq, D].

        In evaluation without gradients the prefix is computed once, and again after any change of the prompt, the gate
        or `sources()`. Otherwise nothing is kept, so nothing stale can be trained on.
        """
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            if not torch.compiler.is_compiling():
                self._cache.clear()
            return self._compute(project, query.dtype)
        weights = sources()
        if weights is None:
            return self._compute(project, query.dtype)
        watched, settings = (*self._parameters.values(), *weights), inference_settings(query)
        prefix = self._cache.get(watched, settings)
        if prefix is None:
            prefix = self._compute(project, query.dtype)
            self._cache.keep(watched, settings, prefix)
        return prefix

    def _compute(self, project: Callable[[Tensor], tuple[Tensor, Tensor]], dtype: torch.dtype) -> Prefix:
        gate = self.effective_gate().to(accumulator_dtype(dtype)).expand(1, self.num_heads)
        return (*project(self.prompt.to(dtype)), gate)

    def train(self, mode: bool = True) -> Self:
        self._cache.clear()
        super().train(mode)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """model.half(), .to(...): the layer moves along but stays float32, as small gradients on top of N(0, 1) need."""
        self._cache.clear()

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.dtype in (torch.float16, torch.bfloat16) else moved

        super()._apply(move, recurse)
        return self


class ZeroGateAdapter(nn.Module):
    """The parameters of one adapter and the model they belong to; what `attach_adapter` and `load_adapter` return.

    Args:
        config: see AdapterConfig.
        base: facts of the model that a saved adapter must find again: model_type, hidden_size, num_hidden_layers,
            num_attention_heads, num_key_value_heads, head_dim.
        devices: of every layer of the model; an adapted layer's parameters live where the layer does.
    """

    def __init__(self, config: AdapterConfig, base: dict[str, Any], devices: Sequence[torch.device]) -> None:
        super().__init__()
        self.config, self.base = config, base
        numbers = config.layer_numbers(base["num_hidden_layers"])
        hidden_size, heads = base["hidden_size"], base["num_attention_heads"]
        self.layers = nn.ModuleDict({str(n): AdapterLayer(config, hidden_size, heads, devices[n]) for n in numbers})

    def num_parameters(self) -> int:
        """Trainable parameters: prompts and gates."""
        return sum(parameter.numel() for parameter in self.parameters())

    def gates(self) -> dict[int, Tensor]:
        """What multiplies the prefix branch, by layer number: [heads] or [1], float32, detached."""
        return {int(n): layer.effective_gate().detach() for n, layer in self.layers.items()}

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Writes adapter.safetensors and adapter_config.json into the folder `path`.

        Each file is written aside, flushed and renamed: when the disk fills, what was there stays whole.

        Raises:
            OSError: the folder cannot be written.
        """
        from safetensors.torch import save

        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        facts = {"format_version": FORMAT_VERSION, "base_model": self.base, "adapter": asdict(self.config)}
        _write_whole(folder / WEIGHTS_FILE, save(state, {"format": "pt"}))
        _write_whole(folder / CONFIG_FILE, (json.dumps(facts, indent=2) + "\n").encode())


def _write_whole(path: Path, content: bytes) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(aside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def read_config(path: str | os.PathLike[str]) -> tuple[AdapterConfig, dict[str, Any]]:
    """(adapter config, facts of its base model) of a saved adapter.

    Raises:
        OSError: no adapter in this folder.
        ValueError: the file is of another format.
    """
    file = Path(path) / CONFIG_FILE
    try:
        facts = json.loads(file.read_text())
        version = facts["format_version"]
        if version != FORMAT_VERSION:
            raise ValueError(f"expected format_version {FORMAT_VERSION}, got {version}")
        return AdapterConfig(**facts["adapter"]), dict(facts["base_model"])
    except (KeyError, TypeError, ValueError) as error:  # a JSONDecodeError or a field out of range is a ValueError
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"{file}: expected the configuration of an adapter saved by this package ({what})") from error


def read_weights(adapter: ZeroGateAdapter, path: str | os.PathLike[str]) -> None:
    """Fills the adapter from a saved one. Nothing is unpickled.

    Raises:
        OSError: there is no such file.
        ValueError: names or shapes differ; the message gives both.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = Path(path) / WEIGHTS_FILE
    if not file.exists():
        raise FileNotFoundError(f"{file}: no such file")
    try:
        state = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file}: expected a safetensors file ({error})") from error
    own = adapter.state_dict()
    if state.keys() != own.keys():
        raise ValueError(f"{file}: expected tensors {sorted(own)}, got {sorted(state)}")
    for name, tensor in state.items():
        if tensor.shape != own[name].shape:
            raise ValueError(f"{file}: {name}: expected shape {list(own[name].shape)}, got {list(tensor.shape)}")
    adapter.load_state_dict(state)
