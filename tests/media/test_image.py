"""Image files as users have them."""

import contextlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llama_adapter_kernels.errors import UserError
from llama_adapter_kernels.media import image as media_image
from llama_adapter_kernels.media.image import read_image

COLOURS = np.zeros((4, 6, 3), dtype=np.uint8)
COLOURS[:, :3] = (200, 30, 40)
COLOURS[:2, 3:] = (10, 220, 60)


def test_a_plain_picture(tmp_path: Path) -> None:
    Image.fromarray(COLOURS).save(tmp_path / "a.png")
    assert np.array_equal(np.asarray(read_image(tmp_path / "a.png")), COLOURS)


def test_grey_has_three_equal_channels(tmp_path: Path) -> None:
    Image.fromarray(COLOURS[..., 0]).save(tmp_path / "a.png")
    pixels = np.asarray(read_image(tmp_path / "a.png"))
    assert np.array_equal(pixels, np.repeat(COLOURS[..., :1], 3, axis=2))


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    values = np.array([[0, 1000, 32768, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    assert np.asarray(read_image(tmp_path / "a.png"))[0, :, 0].tolist() == [0, 4, 128, 255]


def test_cmyk(tmp_path: Path) -> None:
    Image.fromarray(COLOURS).convert("CMYK").save(tmp_path / "a.tif")
    pixels = read_image(tmp_path / "a.tif")
    assert pixels.mode == "RGB"
    assert np.abs(np.asarray(pixels).astype(int) - COLOURS).max() <= 2


def test_palette_with_transparency_is_white_where_transparent(tmp_path: Path) -> None:
    picture = Image.fromarray(COLOURS).convert("RGBA")
    picture.putpixel((0, 0), (9, 9, 9, 0))
    picture.save(tmp_path / "a.png")
    pixels = np.asarray(read_image(tmp_path / "a.png"))
    assert pixels[0, 0].tolist() == [255, 255, 255]
    assert pixels[3, 0].tolist() == [200, 30, 40]
    indexed = Image.new("P", (2, 1))
    indexed.putpalette([255, 0, 0, 0, 0, 255])
    indexed.putdata([0, 1])
    indexed.save(tmp_path / "b.gif", transparency=1)
    assert np.asarray(read_image(tmp_path / "b.gif"))[0].tolist() == [[255, 0, 0], [255, 255, 255]]


def test_exif_rotation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    Image.fromarray(COLOURS).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(np.asarray(read_image(tmp_path / "a.png")), np.rot90(COLOURS, -1))


def test_the_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (3, 3), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert np.asarray(read_image(tmp_path / "a.gif"))[0, 0].tolist() == [255, 0, 0]


def test_what_is_no_picture_is_named_with_its_row(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"rows\.json, row 3: .*none\.png: no such file"):
        read_image(tmp_path / "none.png", "rows.json, row 3")
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(UserError, match=r"row 3: .*text\.png: not an image"):
        read_image(tmp_path / "text.png", "row 3")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"cut\.png: a broken image"):
        read_image(tmp_path / "cut.png")
    with pytest.raises(UserError):
        read_image(tmp_path)


def test_huge_pictures_are_refused_before_they_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("1", (200, 100)).save(tmp_path / "a.png")
    monkeypatch.setattr(media_image, "MAX_PIXELS", 10_000)
    with pytest.raises(UserError, match="expected at most 10,000 pixels, got 200 x 100"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("share", range(5, 100, 10))
def test_truncated_files_never_crash(tmp_path: Path, share: int) -> None:
    pixels = np.random.default_rng(1).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    for name in ("a.jpg", "a.png", "a.gif", "a.tif", "a.webp", "a.bmp"):
        Image.fromarray(pixels).save(tmp_path / name)
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: len(content) * share // 100])
        with contextlib.suppress(UserError):  # some decoders show what there is
            assert read_image(tmp_path / name).mode == "RGB"
