"""From image bytes to RGB pixels.

JPEGs come from simplejpeg where it is installed, everything else (and CMYK JPEGs) from Pillow. Both use
libjpeg-turbo, so the pixels are the same. EXIF orientation is not applied: pixels are used as stored, like in
the pipelines that ImageNet results were published with, and like the manifest's width and height.
"""

from __future__ import annotations

import importlib
import io
from types import ModuleType

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from framework.data.limits import IMAGE_FORMATS, MAX_IMAGE_PIXELS
from framework.data.video import Undecodable

__all__ = ["decode_image"]


def _optional_simplejpeg() -> ModuleType | None:
    try:
        return importlib.import_module("simplejpeg")
    except ImportError:  # also a wheel whose shared libraries are missing
        return None


_simplejpeg = _optional_simplejpeg()


def decode_image(data: bytes, *, simplejpeg: bool = True) -> NDArray[np.uint8]:
    """RGB pixels (height, width, 3); grey, palette, CMYK and 16 bits are converted, alpha is dropped.

    Errors:
        Undecodable: the bytes are no image, are cut short, or hold more than `MAX_IMAGE_PIXELS` pixels.
    """
    if simplejpeg and _simplejpeg is not None and data[:3] == b"\xff\xd8\xff":
        try:
            height, width, colorspace, _ = _simplejpeg.decode_jpeg_header(data)
            if colorspace in ("RGB", "YCbCr", "Gray"):
                _check_size(width, height)
                return _simplejpeg.decode_jpeg(data, colorspace="RGB")
        except ValueError as error:
            if isinstance(error, Undecodable):
                raise
            # libjpeg's complaints stop simplejpeg, while Pillow knows which of them still leave an image.
    return _pillow(data)


def _pillow(data: bytes) -> NDArray[np.uint8]:
    try:
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
            _check_size(*image.size)
            if image.mode.startswith("I"):  # 16 bits of grey: `convert` would clip instead of scaling
                grey = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
                return np.repeat(grey[:, :, None], 3, axis=2)
            return np.array(image.convert("RGB"))
    except Undecodable:
        raise
    except Exception as error:  # its parsers raise what damaged numbers run into: IndexError, struct.error, …
        raise Undecodable(f"{type(error).__name__}: {error}") from error


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_IMAGE_PIXELS:
        raise Undecodable(f"{width}x{height} pixels; at most {MAX_IMAGE_PIXELS} are decoded")
