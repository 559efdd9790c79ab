"""Sound files as mono float32 at the rate that an encoder wants."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from llama_adapter_kernels.errors import UserError

if TYPE_CHECKING:
    import numpy as np

log = logging.getLogger(__name__)

MAX_SECONDS = 60.0


def read_audio(path: Path, rate: int, where: str = "", max_seconds: float = MAX_SECONDS) -> "np.ndarray":
    """The sound, [samples] float32: channels averaged, resampled to `rate` (Hz), at most `max_seconds` of it.

    Formats are those of libsndfile (WAV, FLAC, OGG, MP3, ...). Of a longer file only the beginning is read, with a warning.

    Raises:
        UserError: no such file, not a sound, an empty or a silent-by-NaN one.
    """
    import numpy as np
    import soundfile
    import soxr

    begin = f"{where}: " if where else ""
    if not path.exists():
        raise UserError(f"{begin}{path}: no such file")
    try:
        with soundfile.SoundFile(path) as file:
            own_rate, frames = file.samplerate, file.frames
            samples = file.read(int(max_seconds * own_rate), dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, OSError) as error:
        reason = str(error).split(":")[-1].strip().rstrip(".")
        raise UserError(f"{begin}{path}: not a sound that libsndfile reads ({reason})") from None
    if len(samples) == 0:
        raise UserError(f"{begin}{path}: an empty sound")
    if frames > len(samples):
        log.warning("%s%s: %.0f s long, only the first %.0f s are heard", begin, path, frames / own_rate, max_seconds)
    mono = samples.mean(axis=1)
    if not np.isfinite(mono).all():
        raise UserError(f"{begin}{path}: expected finite samples, some are NaN or infinite")
    if own_rate != rate:
        mono = soxr.resample(mono, own_rate, rate)
    return np.ascontiguousarray(mono, dtype=np.float32)
