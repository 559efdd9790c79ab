"""Loading of base models and adapters from disk or hub, with errors a user can act on."""

import hashlib
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llama_adapter_kernels import hub
from llama_adapter_kernels.errors import UserError

log = logging.getLogger(__name__)

DTYPES = ("auto", "float32", "bfloat16", "float16")
WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_NAMED_TENSORS = 3  # of those that do not fit, by name; the rest are counted


def pick_dtype(name: str, *, on_cpu: bool, training: bool = True) -> Any:
    """The torch dtype for a `--dtype`; "auto": float32 on a CPU, bfloat16 on a GPU that has it (else float16).

    Raises:
        UserError: an unknown name, or float16 training on a CPU, where there is no loss scaling.
    """
    check_dtype(name, on_cpu=on_cpu, training=training)
    import torch

    if name == "auto":
        if on_cpu:
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return getattr(torch, name)


def check_dtype(name: str, *, on_cpu: bool, training: bool = True) -> None:
    """Raises UserError for a `--dtype` that does not exist, or that cannot be trained in."""
    if name not in DTYPES:
        raise UserError(f"--dtype: expected one of {', '.join(DTYPES)}, got {name!r}")
    if name == "float16" and on_cpu and training:
        raise UserError("--dtype float16: training in float16 needs a GPU; expected float32 or bfloat16")


def check_model_name(name: str) -> None:
    """Raises UserError for a `--model` that is neither a Hugging Face model folder nor a possible name on a hub."""
    folder = Path(name)
    if folder.is_dir() and not (folder / "config.json").exists():
        raise UserError(f"--model {name}: no config.json in this folder; expected a Hugging Face model folder")
    if folder.is_file():
        raise UserError(f"--model {name}: expected a Hugging Face model folder or a hub name, it is a file")
    if not folder.exists() and (name.count("/") > 1 or name.startswith((".", "/", "~"))):
        raise UserError(f"--model {name}: no such folder")
    if not folder.exists() and not hub.is_cached(name, "config.json"):
        try:
            hub.check_reachable()
        except UserError as error:
            raise UserError(f"--model {name}: no such folder, and not from the hub either: {error}") from None


def load_config(name: str) -> Any:
    """The configuration of a model, without its weights.

    Raises:
        UserError: there is no such model, or transformers does not know its kind.
    """
    from transformers import AutoConfig

    check_model_name(name)
    with _loading(name):
        return AutoConfig.from_pretrained(name)


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a model.

    Raises:
        UserError: there is no tokenizer, or transformers cannot read it.
    """
    from transformers import AutoTokenizer

    check_model_name(name)
    with _loading(name):
        _refuse_lfs_pointers(name, ("tokenizer*", "*.json", "*.model"))
        tokenizer = AutoTokenizer.from_pretrained(name)
    tokenizer.model_max_length = int(1e30)  # lengths are checked here, with better words than the tokenizer's warning
    return tokenizer


def load_model(name: str, dtype: Any, **options: Any) -> Any:
    """A causal language model from a local Hugging Face folder or a hub name, every weight from its files.

    Args:
        options: for transformers' `from_pretrained`.

    Raises:
        UserError: there is no such model, transformers cannot load it, or its files do not have all of its weights.
    """
    from transformers import AutoModelForCausalLM

    check_model_name(name)
    with _loading(name):
        _refuse_lfs_pointers(name, WEIGHT_FILES)
        _refuse_broken_files(name)
        model, found = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    # transformers would train on with random numbers in these places.
    wrong = [f"{key} {list(theirs)} instead of {list(ours)}" for key, theirs, ours in sorted(found["mismatched_keys"])]
    if wrong:
        raise UserError(f"--model {name}: the weights do not fit config.json: {_some(wrong)}")
    if found["missing_keys"]:
        missing = _some(sorted(found["missing_keys"]))
        raise UserError(f"--model {name}: config.json asks for weights that the files do not have: {missing}")
    if found["unexpected_keys"]:
        log.warning("--model %s: weights that config.json has no place for were left out: %s",
                    name, _some(sorted(found["unexpected_keys"])))  # fmt: skip
    return model


def load_model_and_tokenizer(name: str, dtype: Any) -> tuple[Any, Any]:
    """A causal language model and its tokenizer.

    Raises:
        UserError: as `load_model` and `load_tokenizer`.
    """
    tokenizer = load_tokenizer(name)
    return load_model(name, dtype), tokenizer


def skeleton(name: str) -> Any:
    """The model without memory for its weights: what fits this one fits the real one, and it takes no time to make.

    Raises:
        UserError: as `load_config`, or it is no causal language model.
    """
    import torch
    from transformers import AutoModelForCausalLM

    config = load_config(name)
    with _loading(name), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def context_length(config: Any) -> int | None:
    """The most tokens a model takes at once; None where its configuration does not say."""
    length: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return length


def weights_fingerprint(name: str) -> str:
    """SHA-256 over a model's configuration and weight files, for a local folder; of a hub name, the commit it is at.

    The names of the files count for nothing but their order: a folder may be moved, not changed.
    """
    folder = Path(name)
    if not folder.is_dir():
        commit = getattr(load_config(name), "_commit_hash", None)
        return f"commit {commit}"
    files = [folder / "config.json", *sorted(path for pattern in WEIGHT_FILES for path in folder.glob(pattern))]
    with ThreadPoolExecutor() as executor:  # hashing releases the interpreter's lock
        digests = executor.map(_sha256, files)
        return hashlib.sha256("".join(digests).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def adapter_error_as_user_error() -> Iterator[None]:
    """The adapter's own messages name both sides already (model and adapter)."""
    try:
        yield
    except (ValueError, OSError, NotImplementedError) as error:
        raise UserError(str(error)) from error


@contextmanager
def _loading(name: str) -> Iterator[None]:
    """What other people's files make other people's readers raise is of every kind, and each is the files' fault."""
    try:
        yield
    except (ImportError, UserError):  # a package is missing, and the command line says which
        raise
    # Broad on purpose: the readers are other people's, and the traceback goes to the debug log.
    except Exception as error:
        log.debug("loading %s", name, exc_info=True)
        said = hub.why(error) if hub.is_hub_name(name) else " ".join(str(error).split())
        kind = "" if isinstance(error, (OSError, ValueError)) and said else f"{type(error).__name__}: "
        raise UserError(f"--model {name}: {kind}{said[:500]}") from error


def _refuse_lfs_pointers(name: str, patterns: tuple[str, ...]) -> None:
    for path in (path for pattern in patterns for path in Path(name).glob(pattern) if Path(name).is_dir()):
        with path.open("rb") as file:
            if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
                raise UserError(f"--model {name}: {path.name} is a Git LFS pointer, not the file: run `git lfs pull`")


def _refuse_broken_files(name: str) -> None:
    """transformers passes on what safetensors says, which does not name the file."""
    from safetensors import SafetensorError, safe_open

    for path in sorted(Path(name).glob("*.safetensors")) if Path(name).is_dir() else []:
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError as error:
            raise UserError(f"--model {name}: {path.name} is damaged or incomplete ({error})") from error


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED_TENSORS} more" if len(names) > _NAMED_TENSORS else ""
    return ", ".join(names[:_NAMED_TENSORS]) + more
