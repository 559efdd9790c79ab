"""All formats of adapters by name: which one a file has, its reader and its writer."""

import logging
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from llama_adapter_kernels import hub
from llama_adapter_kernels.adapters.state import AdapterState
from llama_adapter_kernels.formats import accessory, litgpt, litgpt_writing, native, official, peft, peft_method
from llama_adapter_kernels.formats.files import listed
from llama_adapter_kernels.formats.meta_names import MetaKeys, sort_keys
from llama_adapter_kernels.formats.opening import open_source
from llama_adapter_kernels.formats.reading import Choices, Reading, Source

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Format:
    """A foreign format.

    Args:
        title: for people.
        matches: it has such keys; the second argument is the same keys sorted by Meta's names.
        read: see formats.reading.
    """

    title: str
    matches: Callable[[Source, MetaKeys], bool]
    read: Callable[[Source, Choices], Reading]


def _table(source: Source, keys: MetaKeys) -> bool:
    """Official prompts: in a file of V1 if nothing is tuned or shown besides, of V2 multimodal otherwise."""
    return "adapter_query.weight" in keys.rest and not _chat(source, keys)


def _chat(source: Source, keys: MetaKeys) -> bool:
    return any(name.endswith(("_bias", "_scale")) for found in keys.tuned.values() for name in found.values())


def _visual(source: Source, keys: MetaKeys) -> bool:
    named = any(name.startswith(("visual_", "clip_proj")) for name in keys.rest)
    return named or any(name.startswith(("llama.", "llma.")) for name in source.shapes)


FORMATS: Mapping[str, Format] = {
    "official-v1": Format("LLaMA-Adapter V1", lambda s, k: _table(s, k) and not _visual(s, k), official.read_v1),
    "official-v2-chat": Format("LLaMA-Adapter V2 chat", _chat, official.read_chat),
    "official-v2-multimodal": Format(
        "LLaMA-Adapter V2 multimodal", lambda s, k: _table(s, k) and _visual(s, k), official.read_multimodal
    ),
    "imagebind-llm": Format(
        "ImageBind-LLM",
        lambda s, k: "prefix_query.weight" in k.rest and not any(name.startswith("mu_mert") for name in k.rest),
        official.read_image_bind,
    ),
    "mu-llama": Format(
        "MU-LLaMA",
        lambda s, k: "prefix_query.weight" in k.rest and any(name.startswith("mu_mert") for name in k.rest),
        official.read_mu_llama,
    ),
    "llama2-accessory": Format(
        "LLaMA2-Accessory", lambda s, k: "prefix" in k.rest and "prefix_gate" in k.rest, accessory.read
    ),
    "peft": Format("PEFT ADAPTION_PROMPT", lambda s, k: peft.matches(set(s.shapes)), peft.read),
    "peft-zero-gate": Format(
        "lak.ZeroGateConfig, saved by PEFT", lambda s, k: peft_method.matches(s), peft_method.read
    ),
    "litgpt": Format("LitGPT or lit-llama", lambda s, k: litgpt.matches(set(s.shapes)), litgpt.read),
}
WRITERS: Mapping[str, Callable[[Path, AdapterState], tuple[str, ...]]] = {
    "official-v1": official.write_v1,
    "peft": peft.write,
    "litgpt": litgpt_writing.write,
}


def read_adapter(path: str | os.PathLike[str], format: str = "auto", choices: Choices | None = None) -> Reading:
    """An adapter of any format, as it is in memory.

    Args:
        path: a file or folder, or the name of a repository on the Hugging Face hub.
        format: "native", a key of FORMATS, or "auto": recognised by the keys of its tensors.
        choices: what the file does not say.

    Raises:
        OSError: it cannot be read.
        ValueError: it is of no known format or not of this one, its parts do not fit each other, or it lies.
    """
    if not isinstance(path, str | os.PathLike):
        raise ValueError(f"path: expected a folder, a file or owner/name, got {type(path).__name__}")
    place, choices = hub.adapter_place(path), choices or Choices()
    if format not in ("auto", "native", *FORMATS):
        raise ValueError(f"format: expected auto, native, {', '.join(FORMATS)}, got {format!r}")
    if format == "native" or (format == "auto" and native.is_native(place)):
        return Reading(native.read(place), ())
    source = open_source(place)
    keys = sort_keys(source)
    fitting = [name for name, known in FORMATS.items() if known.matches(source, keys)]
    if format == "auto":
        if len(fitting) != 1:
            which = f"keys of {' and '.join(fitting)}" if fitting else "keys of none of them"
            known = ", ".join(FORMATS)
            raise ValueError(f"{path}: expected an adapter of native, {known}; got {which}: {listed(source.shapes)}")
        format = fitting[0]
    elif format not in fitting:
        raise ValueError(
            f"{path}: expected keys of {format}, got {', '.join(fitting) or 'none'}: {listed(source.shapes)}"
        )
    reading = FORMATS[format].read(source, choices)
    return Reading(reading.state, (f"{path}: {FORMATS[format].title}", *reading.notes), format)


def tell(reading: Reading) -> None:
    """Logs what the reader decided, and warns of what is not used."""
    for note in reading.notes:
        _LOG.info(note)
    if reading.state.leftover:
        names = dict.fromkeys(name.partition(".")[0] for name in reading.state.leftover)
        warnings.warn(f"kept beside the adapter, without effect: {listed(sorted(names), every=True)}", stacklevel=3)
