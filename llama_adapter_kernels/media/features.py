"""Features of files, computed once: a folder of safetensors, one file per picture or sound, encoder and view."""

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from llama_adapter_kernels.errors import UserError
from llama_adapter_kernels.media.encoders import Encoder

_BATCH, _REMEMBERED = 64, 4096  # files encoded at a time, and kept in memory


class FeatureStore:
    """Features by the content of a file: a renamed file is known, a changed one is encoded again.

    Args:
        encoder: computes what is not there yet.
        view, depths: which features; see the conditioning modules.
        folder: where they are kept; None: in memory only.
    """

    def __init__(self, encoder: Encoder, view: str, depths: int = 1, folder: Path | None = None) -> None:
        self.encoder, self.view, self.depths, self.folder = encoder, view, depths, folder
        self.encoded = 0  # files, in this process
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
        return self.features_of([path], [where])[0]

    def features_of(self, paths: Sequence[Path], wheres: Sequence[str] | None = None) -> list[Tensor]:
        """The features of several files; those that are not known yet are encoded together."""
        wheres = [""] * len(paths) if wheres is None else wheres
        keys = [self._key(path, where) for path, where in zip(paths, wheres, strict=True)]
        found = {key: tensor for key in dict.fromkeys(keys) if (tensor := self._known(key)) is not None}
        missing = {key: number for number, key in enumerate(keys) if key not in found}
        if missing:
            numbers = list(missing.values())
            chosen = [paths[number] for number in numbers], [wheres[number] for number in numbers]
            new = self.encoder.encode_many(chosen[0], self.view, self.depths, chosen[1])
            for key, tensor in zip(missing, new, strict=True):
                found[key] = tensor
                self._keep(key, tensor)
        return [found[key] for key in keys]

    def encode_all(self, paths: Sequence[tuple[Path, str]], progress: Callable[[int], None]) -> int:
        """Encodes every file that is not known yet; returns how many those were."""
        before = self.encoded
        for start in range(0, len(paths), _BATCH):
            part = paths[start : start + _BATCH]
            self.features_of([path for path, _ in part], [where for _, where in part])
            progress(start + len(part))
        return self.encoded - before

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

    def _known(self, key: str) -> Tensor | None:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        if key in self._memory:
            return self._memory[key]
        if self.folder is None or not (file := self.folder / f"{key}.safetensors").exists():
            return None
        try:
            features = load_file(file)["features"]
        except (SafetensorError, KeyError, OSError):  # of an interrupted disk: computed again
            return None
        self._remember(key, features)
        return features

    def _remember(self, key: str, features: Tensor) -> None:
        if len(self._memory) < _REMEMBERED:
            self._memory[key] = features

    def _keep(self, key: str, features: Tensor) -> None:
        from safetensors.torch import save

        self.encoded += 1
        self._remember(key, features)
        if self.folder is None:
            return
        aside = self.folder / f".{key}.{os.getpid()}"
        try:
            aside.write_bytes(save({"features": features.contiguous()}))
            os.replace(aside, self.folder / f"{key}.safetensors")
        except OSError as error:
            aside.unlink(missing_ok=True)
            raise UserError(f"{self.folder}: {error.strerror}") from None
