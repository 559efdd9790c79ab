"""Sound files as users have them."""

from pathlib import Path

import numpy as np
import pytest

from llama_adapter_kernels.errors import UserError
from llama_adapter_kernels.media.audio import read_audio

soundfile = pytest.importorskip("soundfile", reason="soundfile is not installed")


def tone(rate: int, seconds: float = 1.0, pitch: float = 440.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * pitch * np.arange(int(rate * seconds)) / rate)).astype(np.float32)


def test_the_same_rate_is_read_as_it_is(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", tone(16000), 16000, subtype="FLOAT")
    heard = read_audio(tmp_path / "a.wav", 16000)
    assert heard.dtype == np.float32
    np.testing.assert_array_equal(heard, tone(16000))


def test_stereo_is_averaged(tmp_path: Path) -> None:
    left, right = tone(16000), tone(16000, pitch=660)
    soundfile.write(tmp_path / "a.wav", np.stack([left, right], 1), 16000, subtype="FLOAT")
    np.testing.assert_allclose(read_audio(tmp_path / "a.wav", 16000), (left + right) / 2, atol=1e-7)


@pytest.mark.parametrize("own", [8000, 22050, 44100])
def test_other_rates_are_resampled(tmp_path: Path, own: int) -> None:
    soundfile.write(tmp_path / "a.flac", tone(own), own)
    heard = read_audio(tmp_path / "a.flac", 16000)
    assert abs(len(heard) - 16000) <= 1
    middle = slice(2000, 14000)
    np.testing.assert_allclose(heard[middle], tone(16000)[middle], atol=2e-3)


def test_of_an_hour_only_the_beginning_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    soundfile.write(tmp_path / "a.flac", np.zeros(8000 * 3600, dtype=np.int16), 8000)
    with caplog.at_level("WARNING"):
        heard = read_audio(tmp_path / "a.flac", 8000, "row 2")
    assert len(heard) == 60 * 8000
    assert "row 2: " in caplog.text
    assert "3600 s long, only the first 60 s are heard" in caplog.text


def test_what_is_no_sound_is_named_with_its_row(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"row 4: .*none\.wav: no such file"):
        read_audio(tmp_path / "none.wav", 16000, "row 4")
    (tmp_path / "text.wav").write_text("hello")
    with pytest.raises(UserError, match=r"text\.wav: not a sound that libsndfile reads"):
        read_audio(tmp_path / "text.wav", 16000)
    soundfile.write(tmp_path / "empty.wav", np.zeros(0, dtype=np.float32), 16000)
    with pytest.raises(UserError, match=r"empty\.wav: an empty sound"):
        read_audio(tmp_path / "empty.wav", 16000)
    soundfile.write(tmp_path / "nan.wav", np.full(100, np.nan, dtype=np.float32), 16000, subtype="FLOAT")
    with pytest.raises(UserError, match=r"nan\.wav: expected finite samples"):
        read_audio(tmp_path / "nan.wav", 16000)
    with pytest.raises(UserError):
        read_audio(tmp_path, 16000)
