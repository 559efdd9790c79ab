"""Images and sound for a language model with an adapter: prompts from the features of a frozen encoder."""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from llama_adapter_kernels.adapters.conditioning import ConditioningConfig, build_conditioning
from llama_adapter_kernels.adapters.precision import KeepsFloat32
from llama_adapter_kernels.formats.files import read_json, read_safetensors, write_whole
from llama_adapter_kernels.formats.visual import find_conditioning
from llama_adapter_kernels.integrations.adapter import ZeroGateAdapter
from llama_adapter_kernels.integrations.choosing import adapters_per_sequence, attached_adapters
from llama_adapter_kernels.media.encoders import Encoder, load_encoder
from llama_adapter_kernels.media.features import FeatureStore

CONFIG_FILE = "conditioning.json"
WEIGHTS_FILE = "conditioning.safetensors"
ATTRIBUTE = "zero_gate_conditioning"  # of the model: so its parameters train and move with the model's


class Conditioning(KeepsFloat32):
    """What an adapter sees or hears; `attach_conditioning` and `load_conditioning` return it.

    Attributes:
        config: see ConditioningConfig.
        projection: the module from features to prompts, the only part that learns.
        encoder: frozen; None where features come from elsewhere.
    """

    def __init__(
        self, model: nn.Module, adapter: ZeroGateAdapter, config: ConditioningConfig, encoder: Encoder | None
    ) -> None:
        super().__init__()
        self.config = config
        self.projection = build_conditioning(config)
        # Not submodules: the model has them already, and the encoder must not be trained or saved.
        self.__dict__.update(model=model, adapter=adapter, encoder=encoder)
        self.store = None if encoder is None else FeatureStore(encoder, config.view, config.depths)

    def forward(self, features: Tensor) -> Tensor:
        """Prompts from features [N, ...] of the view that the config names.

        Returns:
            [N, P, hidden] for all adapted layers, or [N, L, P, hidden] with early fusion.
        """
        prompts = cast(Tensor, self.projection(features.to(next(self.projection.parameters()).dtype)))
        if self.config.fusion == "all":
            return prompts
        layers = len(self.adapter.layers)
        nothing = prompts.new_zeros(prompts.shape[0], layers - 1, *prompts.shape[1:])
        return torch.cat([prompts[:, None], nothing], dim=1)

    def keep_features_in(self, folder: str | os.PathLike[str]) -> None:
        """Features of files are kept in `folder`, so that no file is encoded twice, in this run or a later one."""
        if self.encoder is None:
            raise ValueError("encoder: expected one to compute features with, this conditioning has none")
        self.store = FeatureStore(self.encoder, self.config.view, self.config.depths, Path(folder))

    @contextmanager
    def seeing(self, files: Sequence[str | os.PathLike[str] | None]) -> Iterator[None]:
        """Within the block sequence b of every batch sees (or hears) `files[b]`; None: nothing. Generation included.

        Raises:
            UserError: a file cannot be read.
            ValueError: there is no encoder; within the block: the batch has another size.
        """
        if self.store is None:
            raise ValueError("encoder: expected one to compute features with, this conditioning has none")
        paths = [Path(file) for file in files if file is not None]
        features = iter(self.store.features_of(paths))
        with self.given([None if file is None else next(features) for file in files]):
            yield

    @contextmanager
    def given(self, features: Sequence[Tensor | None]) -> Iterator[None]:
        """As `seeing`, from features that are there already: for each sequence (packed ones counted each) one or None.

        Gradients reach the projection where they are enabled. Equal tensors (the same object) are projected once.
        """
        distinct = {id(one): one for one in features if one is not None}
        conditions: list[Tensor | None] = [None] * len(features)
        if distinct:
            device = next(self.projection.parameters()).device
            prompts = dict(zip(distinct, self(torch.stack(list(distinct.values())).to(device)), strict=True))
            conditions = [None if one is None else prompts[id(one)] for one in features]
        names = [self.adapter.name] * len(features)
        with adapters_per_sequence(self.model, names, conditions=conditions):
            yield

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Writes adapter and conditioning into the folder `path`, as the adapter's own `save_pretrained` does.

        The encoder is named, not copied.
        """
        self.adapter.save_pretrained(path)

    def write(self, folder: Path) -> None:
        """Writes conditioning.json and conditioning.safetensors into `folder`."""
        from safetensors.torch import save

        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.projection.state_dict().items()}
        write_whole(folder / WEIGHTS_FILE, save(tensors, {"format": "pt"}))
        facts = {"format_version": 1, "conditioning": asdict(self.config)}
        write_whole(folder / CONFIG_FILE, (json.dumps(facts, indent=2) + "\n").encode())


def attach_conditioning(
    model: nn.Module,
    encoder: str | Encoder | None = None,
    *,
    kind: str = "queries",
    modality: str = "image",
    adapter: str = "default",
    **sizes: Any,
) -> Conditioning:
    """Lets an attached adapter see images or hear sounds. Its parameters train with the adapter's.

    Args:
        model: with an adapter (`attach_adapter`).
        encoder: of transformers: a folder or hub name; "log-mel" for sound without a network; or an Encoder; None where
            features are given (then `width` must be).
        kind: of the module, see ConditioningConfig.
        modality: "image" or "audio".
        adapter: the name of the adapter.
        sizes: further fields of ConditioningConfig: depths, inner_size, blocks, heads, fusion, width.

    Raises:
        ValueError: there is no such adapter, the model has a conditioning, or a size does not fit.
        UserError: the encoder cannot be loaded.
    """
    handle = _adapter(model, adapter)
    if isinstance(encoder, str):
        encoder = load_encoder(encoder, modality)
    if encoder is not None:
        sizes = {"encoder": encoder.name, **sizes}
        if kind == "mu_llama":
            sizes.setdefault("depths", encoder.layers + 1)
        view = ConditioningConfig(kind, 1, 1).view
        width = encoder.width_of(view)
        if sizes.setdefault("width", width) != width:
            raise ValueError(f"width: expected {width}, the encoder's, got {sizes['width']}")
    elif "width" not in sizes:
        raise ValueError("width: expected that of the features, where no encoder is given")
    config = ConditioningConfig(
        kind,
        hidden_size=handle.base["hidden_size"],
        prefix_length=handle.config.prefix_length,
        modality=modality,
        **sizes,
    )
    return _attach(model, handle, config, encoder)


def load_conditioning(
    model: nn.Module, path: str | os.PathLike[str], encoder: str | Encoder | None = None, *, adapter: str = "default"
) -> Conditioning:
    """The conditioning saved beside an adapter, for a model to which that adapter is attached already.

    Where `path` is an official file (LLaMA-Adapter V2 multimodal, ImageBind-LLM, MU-LLaMA) from which the adapter was
    loaded, its parts for images or sound become the conditioning; their encoder must be given.

    Args:
        encoder: in place of the one that the file names.

    Raises:
        OSError: there are no such files.
        ValueError: they are of another form, or for an adapter of other sizes; both sides are named.
        UserError: the encoder cannot be loaded.
    """
    handle, folder = _adapter(model, adapter), Path(path)
    used: frozenset[str] = frozenset()
    if has_conditioning(folder):
        config, tensors = _saved(folder)
    else:
        brought = find_conditioning(handle.leftover, handle.base["hidden_size"], handle.config.prefix_length)
        if brought is None:
            raise FileNotFoundError(
                f"{folder / CONFIG_FILE}: no such file, and no parts for images or sound came with adapter {adapter!r}"
            )
        config, tensors, used = brought
    if encoder is None and config.encoder:
        encoder = config.encoder
    if isinstance(encoder, str):
        encoder = load_encoder(encoder, config.modality)
    if encoder is not None and encoder.width_of(config.view) != config.width:
        raise ValueError(
            f"{folder}: the conditioning was made for an encoder of width {config.width}; {encoder.name} has "
            f"{encoder.width_of(config.view)}"
        )
    if encoder is not None and not config.encoder:
        config = replace(config, encoder=encoder.name)
    conditioning = _attach(model, handle, config, encoder)
    own = conditioning.projection.state_dict()
    theirs = {name: list(tensor.shape) for name, tensor in tensors.items()}
    if theirs != {name: list(tensor.shape) for name, tensor in own.items()}:
        delattr(model, ATTRIBUTE)
        handle.companions.remove(conditioning.write)
        different = sorted(name for name in own.keys() | theirs.keys() if theirs.get(name) != _shape(own.get(name)))
        first = different[0]
        raise ValueError(
            f"{folder / WEIGHTS_FILE}: {first}: expected shape {_shape(own.get(first))}, got {theirs.get(first)}"
        )
    conditioning.projection.load_state_dict(tensors)
    handle.leftover = {name: tensor for name, tensor in handle.leftover.items() if name not in used}
    return conditioning


def _saved(folder: Path) -> tuple[ConditioningConfig, dict[str, Tensor]]:
    """Configuration and weights of a conditioning saved by this package."""
    facts = read_json(folder / CONFIG_FILE)
    if facts.get("format_version") != 1 or not isinstance(facts.get("conditioning"), dict):
        raise ValueError(f"{folder / CONFIG_FILE}: expected a conditioning saved by this package")
    try:
        config = ConditioningConfig(**facts["conditioning"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / CONFIG_FILE}: {str(error)[:300]}") from None
    return config, read_safetensors(folder / WEIGHTS_FILE)


def has_conditioning(path: str | os.PathLike[str]) -> bool:
    """Whether a conditioning is saved in this folder."""
    return (Path(path) / CONFIG_FILE).is_file()


def _attach(
    model: nn.Module, handle: ZeroGateAdapter, config: ConditioningConfig, encoder: Encoder | None
) -> Conditioning:
    if hasattr(model, ATTRIBUTE):
        raise ValueError("model: expected one without a conditioning, it has one")
    sizes = {"hidden_size": handle.base["hidden_size"], "prefix_length": handle.config.prefix_length}
    for name, own in sizes.items():
        if getattr(config, name) != own:
            raise ValueError(f"{name}: expected {own}, the adapter's, got {getattr(config, name)}")
    conditioning = Conditioning(model, handle, config, encoder)
    first = next(iter(handle.layers.values()))
    conditioning.to(first.prompt.device)
    if config.fusion == "early":
        with torch.no_grad():
            first.prompt.zero_()
        first.prompt.requires_grad_(False)
    model.add_module(ATTRIBUTE, conditioning)
    handle.companions.append(conditioning.write)
    if handle.attachment is not None:
        handle.attachment.undo.append(partial(model._modules.pop, ATTRIBUTE, None))
    return conditioning


def _adapter(model: nn.Module, name: str) -> ZeroGateAdapter:
    adapters = attached_adapters(model)
    if name not in adapters:
        raise ValueError(
            f"adapter {name!r}: expected one that is attached; this model has {sorted(adapters) or 'none'}"
        )
    return adapters[name]


def _shape(tensor: Tensor | None) -> list[int] | None:
    return None if tensor is None else list(tensor.shape)
