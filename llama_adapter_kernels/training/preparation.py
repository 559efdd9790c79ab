"""What comes before training: settings, data and model checked against each other, the adapter attached."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import llama_adapter_kernels as lak
from llama_adapter_kernels.errors import UserError
from llama_adapter_kernels.formats import native
from llama_adapter_kernels.integrations.conditioning import has_conditioning
from llama_adapter_kernels.media.encoders import Encoder, load_encoder
from llama_adapter_kernels.models import adapter_error_as_user_error, context_length, skeleton
from llama_adapter_kernels.training.chats import Chat
from llama_adapter_kernels.training.data import MEDIA, Row
from llama_adapter_kernels.training.run_folder import CAPACITY
from llama_adapter_kernels.training.settings import DEFAULT_MAX_LENGTH, Execution, Settings, option
from llama_adapter_kernels.training.tokens import Example


def fitted_settings(model: str, settings: Settings) -> Settings:
    """The settings with what the model decides filled in, checked against the model before its weights are loaded.

    Raises:
        UserError: there is no such model, or the settings do not fit it.
    """
    empty = skeleton(model)
    context = context_length(empty.config)
    length = settings.max_length
    if length is None:
        length = min(DEFAULT_MAX_LENGTH, context or DEFAULT_MAX_LENGTH)
    if context is not None and length > context:
        raise UserError(f"--max-length: expected at most {context} (the model's context), got {length}")
    attach(empty, settings)
    return replace(settings, max_length=length)


def check_tokens(examples: Sequence[Example], network: Any) -> None:
    """Raises UserError where the tokenizer knows tokens that the model does not."""
    largest, known = max(max(example.tokens) for example in examples), network.get_input_embeddings().num_embeddings
    if largest >= known:
        raise UserError(f"the tokenizer gives token {largest}, the model knows {known}: they do not belong together")


def attach(network: Any, settings: Settings, checkpoint: Path | None = None) -> "lak.ZeroGateAdapter":
    """Gives the model the adapter to train, a new one or the one of a checkpoint; everything else is frozen.

    Raises:
        UserError: settings or checkpoint do not fit the model.
    """
    from transformers import set_seed

    set_seed(settings.seed)
    with adapter_error_as_user_error():
        if checkpoint:
            return lak.load_adapter(network, checkpoint)
        adapter = lak.attach_adapter(network, adapter_config(network, settings))
        if settings.init is not None:
            _start_from(adapter, Path(settings.init))
        return adapter


def _start_from(adapter: "lak.ZeroGateAdapter", folder: Path) -> None:
    """Gives the adapter the prompts and gates of a saved one; what that one does not have (V2's tuning) stays new.

    Raises:
        OSError: there is no such adapter.
        ValueError: it has other layers, slots or gates; both sides are named.
    """
    state = native.read(folder)
    total = adapter.base["num_hidden_layers"]

    def form(config: "lak.AdapterConfig") -> dict[str, Any]:
        layers = config.layer_numbers(total)
        return {"layers": f"{layers[0]} to {layers[-1]}", "prefix_length": config.prefix_length, "gate": config.gate,
                "gate_shape": config.gate_shape}  # fmt: skip

    ours, theirs = form(adapter.config), form(state.config)
    different = [name for name in ours if ours[name] != theirs[name]]
    if different:
        wanted = ", ".join(f"{name} {ours[name]}" for name in different)
        found = ", ".join(f"{name} {theirs[name]}" for name in different)
        raise ValueError(f"--init {folder}: expected an adapter with {wanted}, it has {found}")
    own = adapter.state_dict()
    if any(tensor.is_meta for tensor in own.values()):
        return  # a model without weights, on which the settings are checked
    adapter.load_state_dict({name: state.tensors.get(name, tensor) for name, tensor in own.items()})


def check_media(data: str, rows: Sequence[Row | Chat], settings: Settings) -> None:
    """Raises UserError where rows have pictures or sounds and no encoder is given for them, or the other way round."""
    for kind in MEDIA:
        encoder = getattr(settings, f"{kind}_encoder")
        number = next((number for number, row in enumerate(rows, 1) if getattr(row, kind, None) is not None), None)
        if number is not None and encoder is None:
            raise UserError(f'{data}, row {number}: it has "{kind}"; expected --{kind}-encoder to see or hear it with')
        if number is None and encoder is not None:
            raise UserError(f'--{kind}-encoder {encoder}: expected rows with "{kind}" in {data}, none has it')


def encoder_of(settings: Settings) -> Encoder | None:
    """The encoder that the settings name; None if they name none.

    Raises:
        UserError: there is no such encoder.
    """
    for kind in MEDIA:
        name = getattr(settings, f"{kind}_encoder")
        if name is not None:
            return load_encoder(name, kind)
    return None


def attach_senses(
    network: Any, encoder: Encoder | None, settings: Settings, execution: Execution, checkpoint: Path | None = None
) -> "lak.Conditioning | None":
    """Lets the attached adapter see or hear through `encoder`, if there is one; as in a checkpoint, or from the start.

    Raises:
        UserError: the encoder does not fit the settings or the checkpoint.
    """
    if encoder is None:
        return None
    sizes: dict[str, Any] = dict(settings.conditioning_sizes)
    if settings.depths is not None:
        sizes["depths"] = settings.depths
    with adapter_error_as_user_error():
        source = checkpoint or (Path(settings.init) if settings.init is not None else None)
        if source is not None and has_conditioning(source):
            conditioning = lak.load_conditioning(network, source, encoder)
        else:
            conditioning = lak.attach_conditioning(
                network, encoder, kind=settings.conditioning, modality=encoder.modality, fusion=settings.fusion, **sizes
            )
        if execution.features is not None:
            conditioning.keep_features_in(execution.features)
    return conditioning


def check_evaluation(settings: Settings, eval_data: Sequence[Path]) -> None:
    """Raises UserError where what is held out is named twice, or not at all and needed."""
    if eval_data and settings.eval_fraction is not None:
        raise UserError("--eval-data, --eval-fraction: expected one of them, got both")
    if not eval_data and settings.eval_fraction is None:
        for name in ("eval_steps", "early_stopping"):
            if getattr(settings, name) is not None:
                raise UserError(f"{option(name)}: expected --eval-data or --eval-fraction beside it, got none")


def check_held_out(held_out: Sequence[Example], settings: Settings) -> None:
    """Raises UserError where a held-out loss is asked for and there is nothing to measure it on."""
    asked = held_out or settings.eval_fraction is not None
    if asked and not any(example.prompt_length < len(example) for example in held_out):
        raise UserError(f"no held-out example has room for a response within {settings.max_length} tokens")


def check_budgets(examples: Sequence[Example], settings: Settings, execution: Execution) -> None:
    """Raises UserError where a step or a micro-batch has no room for the longest example, or a process gets none."""
    longest = max(map(len, examples))
    budgets = {"tokens_per_step": settings.tokens_per_step, CAPACITY: execution.tokens_per_micro_batch}
    for name, budget in budgets.items():
        if budget is not None and budget < longest:
            raise UserError(
                f"{option(name)}: expected at least {longest}, the longest example (--max-length shortens it); got {budget}"
            )
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if len(examples) < processes:
        raise UserError(f"expected at most as many processes as examples, {len(examples)}; got {processes}")


def adapter_config(network: Any, settings: Settings) -> "lak.AdapterConfig":
    """Prompts in the topmost layers; by default in all but the lowest two, as the paper has it for LLaMA-7B."""
    available = network.config.num_hidden_layers
    layers = max(1, available - 2) if settings.layers is None else settings.layers
    if not 1 <= layers <= available:
        raise UserError(f"--layers: the model has {available} layers, got {layers}")
    return lak.AdapterConfig(
        prefix_length=settings.prefix_length, num_layers=layers, gate=settings.gate, gate_shape=settings.gate_shape,
        tuning=lak.Tuning(lora_rank=settings.lora_rank) if settings.v2 else None,
    )  # fmt: skip
