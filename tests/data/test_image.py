"""Promises of image decoding: the same RGB pixels from both decoders, for every kind of image people have."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from framework.data import image as images
from framework.data.image import decode_image
from framework.data.video import Undecodable


def saved(picture: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


@pytest.fixture(scope="module")
def picture(helpers) -> Image.Image:  # type: ignore[no-untyped-def]
    return Image.fromarray(helpers.moving_frames(1, 41, 67)[0])


def pillow_rgb(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"subsampling": 2}])
@pytest.mark.skipif(images._simplejpeg is None, reason="simplejpeg is not installed")
def test_simplejpeg_and_pillow_give_the_same_pixels(picture: Image.Image, options: dict[str, Any]) -> None:
    data = saved(picture, quality=85, **options)
    pixels = decode_image(data)
    assert pixels.shape == (41, 67, 3)
    np.testing.assert_array_equal(pixels, decode_image(data, simplejpeg=False))


@pytest.mark.parametrize("mode", ["L", "CMYK"])
@pytest.mark.parametrize("simplejpeg", [True, False])
def test_grey_and_cmyk_jpegs(picture: Image.Image, mode: str, simplejpeg: bool) -> None:
    data = saved(picture.convert(mode), quality=95)
    pixels = decode_image(data, simplejpeg=simplejpeg)
    np.testing.assert_array_equal(pixels, pillow_rgb(data))
    grey = np.asarray(picture.convert("L" if mode == "L" else "RGB").convert("RGB"), np.int64)
    assert np.abs(pixels - grey).mean() < 12  # lossy, but neither inverted nor in another order


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1"])
def test_png_modes(picture: Image.Image, mode: str) -> None:
    converted = picture.convert(mode)
    expected = np.asarray(converted.convert("RGB"))
    np.testing.assert_array_equal(decode_image(saved(converted, "PNG")), expected)


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    grey = (np.arange(64 * 64, dtype=np.uint16) * 16).reshape(64, 64)
    pixels = decode_image(saved(Image.fromarray(grey), "PNG"))
    np.testing.assert_array_equal(pixels[:, :, 0], (grey >> 8).astype(np.uint8))
    assert (pixels[:, :, 0] == pixels[:, :, 2]).all()


def test_orientation_tags_are_not_applied(picture: Image.Image) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    data = saved(picture, exif=exif)
    assert decode_image(data).shape == decode_image(data, simplejpeg=False).shape == (41, 67, 3)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("damage", ["empty", "half", "text"])
def test_damaged_images(picture: Image.Image, kind: str, damage: str) -> None:
    data = saved(picture, kind)
    broken = {"empty": b"", "half": data[: len(data) // 2], "text": b"<html>no</html>"}[damage]
    with pytest.raises(Undecodable):
        decode_image(broken)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_large_images_are_refused(picture: Image.Image, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_IMAGE_PIXELS", 41 * 67 - 1)
    with pytest.raises(Undecodable, match="67x41 pixels; at most"):
        decode_image(saved(picture, kind))


@pytest.mark.parametrize("kind", ["EPS", "PPM", "TGA"])
def test_formats_that_no_shard_holds_are_refused(picture: Image.Image, kind: str) -> None:
    with pytest.raises(Undecodable):
        decode_image(saved(picture, kind))
