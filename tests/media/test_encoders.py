"""Views of small random encoders against what transformers returns, and features kept on disk."""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from llama_adapter_kernels.errors import UserError
from llama_adapter_kernels.media.encoders import AudioEncoder, VisionEncoder, load_encoder, spread
from llama_adapter_kernels.media.features import FeatureStore
from tests.support.encoders import save_audio, save_vision


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (20, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


@pytest.mark.parametrize("kind", ["clip", "vit", "dinov2", "siglip"])
def test_views_of_a_vision_tower(kind: str, tmp_path: Path, picture: Path) -> None:
    encoder = load_encoder(str(save_vision(tmp_path / "encoder", kind)), "image")
    assert isinstance(encoder, VisionEncoder)
    pixels = encoder.processor(images=[Image.open(picture)], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        found = encoder.model(pixel_values=pixels, output_hidden_states=True)
    hidden = found.hidden_states
    summary = (lambda states: states.mean(1)) if kind == "siglip" else (lambda states: states[:, 0])
    several = encoder.encode(picture, "multi_scale", 2)
    torch.testing.assert_close(several, torch.stack([summary(hidden[2])[0], summary(hidden[4])[0]]))
    tokens = encoder.encode(picture, "tokens")
    if kind == "clip":
        model = encoder.model
        expected = model.visual_projection(model.vision_model.post_layernorm(found.last_hidden_state))
        torch.testing.assert_close(tokens, expected[0].detach())
        torch.testing.assert_close(encoder.encode(picture, "pooled"), found.image_embeds[0])
        assert (encoder.width_of("tokens"), encoder.width_of("multi_scale")) == (24, 32)
    else:
        torch.testing.assert_close(tokens, found.last_hidden_state[0])
        torch.testing.assert_close(encoder.encode(picture, "pooled"), found.pooler_output[0])
        assert encoder.width_of("tokens") == 32
    assert not any(parameter.requires_grad for parameter in encoder.model.parameters())


@pytest.mark.parametrize("kind", ["wav2vec2", "hubert", "whisper"])
def test_views_of_an_audio_encoder(kind: str, tmp_path: Path) -> None:
    soundfile = pytest.importorskip("soundfile", reason="soundfile is not installed")
    samples = np.random.default_rng(0).standard_normal(8000).astype(np.float32) * 0.1
    soundfile.write(tmp_path / "a.wav", samples, 16000, subtype="FLOAT")
    encoder = load_encoder(str(save_audio(tmp_path / "encoder", kind)), "audio")
    assert isinstance(encoder, AudioEncoder)
    inputs = encoder.extractor(samples, sampling_rate=16000, return_tensors="pt")
    with torch.no_grad():
        found = encoder.model(next(iter(inputs.values())), output_hidden_states=True)
    live = 25 if kind == "whisper" else found.last_hidden_state.shape[1]  # half a second of Whisper's 30 in 1500 frames
    means = torch.stack([states[0, :live].mean(0) for states in found.hidden_states])
    torch.testing.assert_close(encoder.encode(tmp_path / "a.wav", "layer_means"), means)
    torch.testing.assert_close(encoder.encode(tmp_path / "a.wav", "pooled"), means[-1])
    torch.testing.assert_close(encoder.encode(tmp_path / "a.wav", "multi_scale", 3), means[[1, 2, 3]])
    assert encoder.encode(tmp_path / "a.wav", "tokens").shape == (64, 32)
    assert (encoder.layers, encoder.width) == (3, 32)


def test_sounds_of_more_than_a_window_and_of_almost_nothing(tmp_path: Path) -> None:
    soundfile = pytest.importorskip("soundfile", reason="soundfile is not installed")
    encoder = load_encoder(str(save_audio(tmp_path / "encoder", "wav2vec2")), "audio")
    noise = np.random.default_rng(0).standard_normal(31 * 16000).astype(np.float32)
    soundfile.write(tmp_path / "long.wav", noise, 16000, subtype="FLOAT")
    soundfile.write(tmp_path / "short.wav", noise[:3], 16000, subtype="FLOAT")
    for name in ("long.wav", "short.wav"):
        assert encoder.encode(tmp_path / name, "layer_means").isfinite().all()


def test_log_mel_needs_no_network(tmp_path: Path) -> None:
    soundfile = pytest.importorskip("soundfile", reason="soundfile is not installed")
    time = np.arange(16000) / 16000
    for name, pitch in (("low.wav", 200), ("high.wav", 3000)):
        soundfile.write(tmp_path / name, 0.5 * np.sin(2 * np.pi * pitch * time).astype(np.float32), 16000)
    encoder = load_encoder("log-mel", "audio")
    low, high = (encoder.encode(tmp_path / name, "pooled") for name in ("low.wav", "high.wav"))
    assert low.argmax() < high.argmax()
    tokens = encoder.encode(tmp_path / "low.wav", "tokens")
    assert tokens.shape == (32, encoder.width_of("tokens")) == (32, 80)
    assert len({tuple(row) for row in tokens[:, 64:].tolist()}) == 32  # every place in time has its own mark
    assert encoder.encode(tmp_path / "low.wav", "layer_means", 4).shape == (4, 64)


def test_depths_end_with_the_last_layer() -> None:
    assert spread(24, 4) == [6, 12, 18, 24]
    assert spread(5, 2) == [2, 5]
    with pytest.raises(ValueError, match=r"depths: expected 1 to 3 .*, got 4"):
        spread(3, 4)


def test_features_are_encoded_once_by_content(tmp_path: Path, picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = load_encoder(str(save_vision(tmp_path / "encoder", "vit")), "image")
    store = FeatureStore(encoder, "tokens", folder=tmp_path / "kept")
    first = store.features(picture)
    renamed = tmp_path / "renamed.png"
    renamed.write_bytes(picture.read_bytes())
    again = FeatureStore(encoder, "tokens", folder=tmp_path / "kept")
    monkeypatch.setattr(encoder, "encode_many", lambda *arguments: pytest.fail("encoded again"))
    assert torch.equal(again.features(renamed), first)
    assert again.encode_all([(picture, "row 1"), (renamed, "row 2")], lambda done: None) == 0
    monkeypatch.undo()
    Image.new("RGB", (9, 9), "red").save(picture)
    assert not torch.equal(again.features(picture), first)
    other_view = FeatureStore(encoder, "pooled", folder=tmp_path / "kept")
    assert other_view.features(renamed).shape == (32,)
    for file in (tmp_path / "kept").glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:20])  # a disk that was full
    assert torch.equal(FeatureStore(encoder, "tokens", folder=tmp_path / "kept").features(renamed), first)


def test_other_weights_have_another_fingerprint(tmp_path: Path) -> None:
    encoder = load_encoder(str(save_vision(tmp_path / "encoder", "vit")), "image")
    before = encoder.fingerprint()
    with torch.no_grad():
        next(encoder.model.parameters()).add_(1.0)
    assert encoder.fingerprint() != before


def test_encoders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--image-encoder"):
        load_encoder(str(tmp_path / "none"), "image")
    config = transformers.LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    transformers.LlamaModel(config).save_pretrained(tmp_path / "llama")
    with pytest.raises(UserError, match="--image-encoder"):
        load_encoder(str(tmp_path / "llama"), "image")
    with pytest.raises(UserError, match="--audio-encoder"):
        load_encoder(str(tmp_path / "llama"), "audio")
