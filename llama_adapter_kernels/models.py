"""Loading of base models and adapters from disk or hub, with errors a user can act on."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llama_adapter_kernels.errors import UserError

DTYPES = ("auto", "float32", "bfloat16", "float16")


def pick_dtype(name: str, *, on_cpu: bool, training: bool = True) -> Any:
    """The torch dtype for a `--dtype`; "auto": float32 on a CPU, bfloat16 on a GPU that has it (else float16).

    Raises:
        UserError: an unknown name, or float16 training on a CPU, where there is no loss scaling.
    """
    import torch

    if name not in DTYPES:
        raise UserError(f"--dtype: expected one of {', '.join(DTYPES)}, got {name!r}")
    if name == "auto":
        if on_cpu:
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if name == "float16" and on_cpu and training:
        raise UserError("--dtype float16: training in float16 needs a GPU; expected float32 or bfloat16")
    return getattr(torch, name)


def load_model_and_tokenizer(name: str, dtype: Any) -> tuple[Any, Any]:
    """A causal language model and its tokenizer from a local Hugging Face folder or a hub name.

    Raises:
        UserError: there is no such model, or transformers cannot load it.
    """
    import transformers

    folder = Path(name)
    if folder.is_dir() and not (folder / "config.json").exists():
        raise UserError(f"--model {name}: no config.json in this folder; expected a Hugging Face model folder")
    if not folder.exists() and (name.count("/") > 1 or name.startswith((".", "/", "~"))):
        raise UserError(f"--model {name}: no such folder")
    if folder.is_file():
        raise UserError(f"--model {name}: expected a Hugging Face model folder or a hub name, it is a file")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    except (OSError, ValueError, KeyError) as error:  # missing files, unknown architecture, broken configuration
        raise UserError(f"--model {name}: {str(error).strip().partition(chr(10))[0]}") from error
    tokenizer.model_max_length = int(1e30)  # lengths are checked here, with better words than the tokenizer's warning
    return model, tokenizer


@contextmanager
def adapter_error_as_user_error() -> Iterator[None]:
    """The adapter's own messages name both sides already (model and adapter)."""
    try:
        yield
    except (ValueError, OSError, NotImplementedError) as error:
        raise UserError(str(error)) from error
