"""Features of files, computed once: a folder of safetensors, one file per picture or sound, encoder and view."""

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from llama_adapter_kernels.errors import UserError
from llama_adapter_kernels.media.encoders import Encoder


class FeatureStore:
    """Features by the content of a file: a renamed file is known, a changed one is encoded again.

    Args:
        encoder: computes what is not there yet.
        view, depths: which features; see the conditioning modules.
        folder: where they are kept; None: in memory only.
    """

    def __init__(self, encoder: Encoder, view: str, depths: int = 1, folder: Path | None = None) -> None:
        self.encoder, self.view, self.depths, self.folder = encoder, view, depths, folder
        self._memory: dict[str, Tensor] = {}
        self._keys: dict[tuple[str, int, int], str] = {}
        self._fingerprint = encoder.fingerprint()
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"{folder}: {error.strerror}") from None

    def features(self, path: Path, where: str = "") -> Tensor:
        """The features of one file, float32, without a batch dimension.

        Raises:
            UserError: the file cannot be read or decoded; `where` names the data row.
        """
        key = self._key(path, where)
        if key in self._memory:
            return self._memory[key]
        found = self._kept(key)
        if found is None:
            found = self.encoder.encode(path, self.view, self.depths, where)
            self._keep(key, found)
        if len(self._memory) < 4096:
            self._memory[key] = found
        return found

    def encode_all(self, paths: Sequence[tuple[Path, str]], progress: Callable[[int], None]) -> int:
        """Encodes every file that is not known yet; returns how many those were."""
        new = 0
        for number, (path, where) in enumerate(paths, 1):
            key = self._key(path, where)
            if key not in self._memory and self._kept(key) is None:
                self._keep(key, self.encoder.encode(path, self.view, self.depths, where))
                new += 1
            progress(number)
        return new

    def _key(self, path: Path, where: str) -> str:
        try:
            status = path.stat()
            known = (str(path), status.st_size, status.st_mtime_ns)
            if known not in self._keys:
                with path.open("rb") as file:
                    content = hashlib.file_digest(file, "sha256").hexdigest()
                asked = f"{content} {self._fingerprint} {self.view} {self.depths}"
                self._keys[known] = hashlib.sha256(asked.encode()).hexdigest()[:32]
            return self._keys[known]
        except OSError as error:
            begin = f"{where}: " if where else ""
            raise UserError(f"{begin}{path}: {(error.strerror or str(error)).lower()}") from None

    def _kept(self, key: str) -> Tensor | None:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        if self.folder is None or not (file := self.folder / f"{key}.safetensors").exists():
            return None
        try:
            return load_file(file)["features"]
        except (SafetensorError, KeyError, OSError):  # of an interrupted disk: computed again
            return None

    def _keep(self, key: str, features: Tensor) -> None:
        from safetensors.torch import save

        if self.folder is None:
            return
        aside = self.folder / f".{key}.{os.getpid()}"
        try:
            aside.write_bytes(save({"features": features.contiguous()}))
            os.replace(aside, self.folder / f"{key}.safetensors")
        except OSError as error:
            aside.unlink(missing_ok=True)
            raise UserError(f"{self.folder}: {error.strerror}") from None


def stacked(features: Sequence[Tensor]) -> Tensor:
    """Features of a batch: [B, ...]."""
    return torch.stack(list(features))
