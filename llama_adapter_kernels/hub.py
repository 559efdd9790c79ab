"""Names on the Hugging Face hub: data sets to read, repositories to write, and a sentence where there is no hub."""

import os
import re
import socket
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from llama_adapter_kernels.errors import UserError

_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_PATIENCE = 10  # seconds
# What an output folder holds besides the adapter.
_NOT_UPLOADED = ["checkpoint-*", "tensorboard*", "wandb*", ".*", "run.json", "*.csv"]


def is_hub_name(text: str) -> bool:
    """Whether a text may name a repository, owner/name, and no file or folder here does."""
    return _NAME.fullmatch(text) is not None and not text.startswith(".") and not Path(text).exists()


def check_reachable() -> None:
    """Raises UserError at once where there is no way to the hub; its client would try again and again for half a minute."""
    from huggingface_hub import constants

    if is_offline():
        raise UserError("HF_HUB_OFFLINE is set")
    if urllib.request.getproxies():
        return  # the proxy knows
    address = urllib.parse.urlsplit(constants.ENDPOINT)
    try:
        with socket.create_connection((address.hostname, address.port or 443), timeout=_PATIENCE):
            pass
    except OSError as error:
        raise UserError(f"the hub ({address.hostname}) cannot be reached: {error.strerror or error}") from None


def is_cached(name: str, file: str, kind: str = "model") -> bool:
    """Whether a repository's file has been downloaded before."""
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(name, file, repo_type=kind), str)


def dataset_folder(name: str, suffixes: tuple[str, ...]) -> Path:
    """The files of a data set on the hub that end in `suffixes`, in a local folder.

    Raises:
        UserError: there is none, or no way to the hub.
    """
    from huggingface_hub import snapshot_download

    try:
        check_reachable()
        patterns = [f"*{suffix}" for suffix in suffixes]
        return Path(snapshot_download(name, repo_type="dataset", allow_patterns=patterns))
    except Exception as error:  # what clients of a network raise is of every kind
        raise UserError(f"--data {name}: no such file or folder, and not from the hub either: {why(error)}") from error


def adapter_place(path: str | os.PathLike[str]) -> Path:
    """The file or folder of an adapter; of one that is on the hub under that name, the folder that its files are in then.

    Raises:
        FileNotFoundError: it may be a name on the hub, but there is no such name or no way to reach the hub.
    """
    name = os.fspath(path)
    if not is_hub_name(name):
        return Path(path)
    from huggingface_hub import snapshot_download

    try:
        if not any(is_cached(name, file) for file in ("zero_gate_adapter.json", "adapter_config.json")):
            check_reachable()
        return Path(snapshot_download(name, local_files_only=is_offline()))
    except Exception as error:  # what clients of a network raise is of every kind
        raise FileNotFoundError(f"{name}: no such folder, and not from the hub either: {why(error)}") from error


def check_upload(name: str, argument: str = "push_to_hub") -> None:
    """Finds out whether an upload will be possible, before hours are spent on what is to be uploaded.

    Args:
        argument: that named the repository, for messages.

    Raises:
        UserError: the name is invalid, nobody is logged in, the owner is somebody else, or there is no way to the hub.
    """
    from huggingface_hub import HfApi

    if not _NAME.fullmatch(name):
        raise UserError(f"{argument}: expected owner/name, got {name!r}")
    try:
        check_reachable()
        me: dict[str, Any] = HfApi().whoami()
    except Exception as error:
        raise UserError(f"{argument} {name}: {why(error)}") from error
    owners = [me["name"], *(one["name"] for one in me.get("orgs", ()))]
    owner = name.partition("/")[0]
    if owner not in owners:
        raise UserError(f"{argument} {name}: expected a repository of {' or '.join(owners)}, got one of {owner}")


def upload(folder: Path, name: str, argument: str = "push_to_hub") -> str:
    """Uploads the adapter in a run's folder with its model card. Returns where it is.

    Raises:
        UserError: it did not work.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        address: Any = api.create_repo(name, exist_ok=True)
        api.upload_folder(
            repo_id=name, folder_path=folder, ignore_patterns=_NOT_UPLOADED, commit_message="The adapter and its card"
        )  # fmt: skip
    except Exception as error:
        raise UserError(f"{argument} {name}: {why(error)}") from error
    return str(address)


def card(name: str, model_type: str, parameters: int) -> str:
    """The README.md of an adapter of which nothing is known but itself."""
    return f"""---
library_name: llama-adapter-kernels
tags:
- llama-adapter
- zero-init-attention
---

# A LLaMA-Adapter for a {model_type} model

{parameters:,} parameters of zero-init attention ([LLaMA-Adapter](https://arxiv.org/abs/2303.16199)). The frozen model that
they belong to is not part of them; loading says which sizes it has to have.

```python
import llama_adapter_kernels as lak

lak.load_adapter(model, "{name}")
```
"""


def is_offline() -> bool:
    """Whether the environment forbids going to the hub."""
    said = [os.environ.get(name, "").upper() for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")]
    return any(word in ("1", "TRUE", "YES", "ON") for word in said)


def why(error: BaseException) -> str:
    """What an error of the hub's client comes to, in some words."""
    if isinstance(error, UserError):
        return str(error)
    names = {kind.__name__ for one in _chain(error) for kind in type(one).__mro__}
    if "LocalTokenNotFoundError" in names:
        return "nobody is logged in to the hub: `hf auth login`, or a token in HF_TOKEN"
    if "GatedRepoError" in names:
        return "its owner has to give access first (a gated repository)"
    if "RepositoryNotFoundError" in names:
        return "there is no such repository on the hub, or it is private and nobody is logged in"
    if is_offline() or names & {"OfflineModeIsEnabled", "LocalEntryNotFoundError", "ConnectError", "ConnectionError",
                                "ConnectTimeout", "Timeout", "TimeoutException", "gaierror"}:  # fmt: skip
        offline = " (HF_HUB_OFFLINE is set)" if is_offline() else ""
        return f"the hub cannot be reached{offline}"
    return " ".join(str(error).split())[:300] or type(error).__name__


def _chain(error: BaseException | None) -> list[BaseException]:
    """An error and what it was raised for."""
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found
