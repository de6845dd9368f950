"""RandAugment (Cubuk et al. 2020, §3), the same operations with the same strength on every frame of a clip.

A magnitude of 10 is the full strength of AutoAugment's table, as in Google's video code and in timm; larger
values go on beyond it. Differing from the first code, every operation grows with the magnitude, and signs are
random. Statistics (for contrast, equalisation) are taken over the whole clip, so brightness does not flicker.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps

from framework.data.randomness import Draws
from framework.recipe.schema import RandAugment

__all__ = ["OPERATIONS", "rand_augment"]

Pixels = NDArray[np.uint8]
Operation = Callable[[Pixels, float], Pixels]
"""Takes frames (n, height, width, 3) and a strength: magnitude / 10, with a sign where two ways are alike."""

_FILL = (128, 128, 128)


def rand_augment(frames: Pixels, settings: RandAugment, draws: Draws) -> Pixels:
    """Apply `settings.layers` random operations to a clip (n, height, width, 3)."""
    frames = np.ascontiguousarray(frames)
    for _ in range(settings.layers):
        operation = OPERATIONS[draws.choice(sorted(OPERATIONS))]
        sign = 1.0 if draws.chance(0.5) else -1.0
        frames = operation(frames, sign * settings.magnitude / 10.0)
    return frames


def _whole(change: Callable[[Image.Image, float], Image.Image]) -> Operation:
    """An operation on single pixels: all frames at once, as one tall image with one set of statistics."""

    def operation(frames: Pixels, strength: float) -> Pixels:
        count, height, width, _ = frames.shape
        tall = Image.fromarray(frames.reshape(count * height, width, 3))
        return np.asarray(change(tall, strength)).reshape(frames.shape)

    return operation


def _each(change: Callable[[Image.Image, float], Image.Image]) -> Operation:
    """An operation that looks at neighbours or moves pixels: frame by frame."""

    def operation(frames: Pixels, strength: float) -> Pixels:
        return np.stack([np.asarray(change(Image.fromarray(frame), strength)) for frame in frames])

    return operation


def _factor(strength: float) -> float:
    """1 leaves the image alone; full strength is 0.1 or 1.9."""
    return max(0.1, 1.0 + 0.9 * strength)


def _solarize_add(image: Image.Image, strength: float) -> Image.Image:
    """Brighten the dark half only."""
    more = round(110 * abs(strength))
    table = [min(255, value + more) if value < 128 else value for value in range(256)]
    return image.point(table * 3)


def _affine(image: Image.Image, matrix: tuple[float, float, float, float, float, float]) -> Image.Image:
    """Move pixels about the middle; `matrix` maps places in the result to places in the source."""
    a, b, c, d, e, f = matrix
    x, y = (image.width - 1) / 2, (image.height - 1) / 2
    centred = (a, b, c + x - a * x - b * y, d, e, f + y - d * x - e * y)
    return image.transform(
        image.size, Image.Transform.AFFINE, centred, resample=Image.Resampling.BILINEAR, fillcolor=_FILL
    )


def _rotate(image: Image.Image, strength: float) -> Image.Image:
    angle = np.deg2rad(30.0 * strength)
    cosine, sine = float(np.cos(angle)), float(np.sin(angle))
    return _affine(image, (cosine, sine, 0.0, -sine, cosine, 0.0))


OPERATIONS: dict[str, Operation] = {
    "auto_contrast": _whole(lambda image, _: ImageOps.autocontrast(image)),
    "equalize": _whole(lambda image, _: ImageOps.equalize(image)),
    "invert": _whole(lambda image, _: ImageOps.invert(image)),
    "posterize": _whole(lambda image, s: ImageOps.posterize(image, max(2, round(8 - 4 * abs(s))))),
    "solarize": _whole(lambda image, s: ImageOps.solarize(image, max(32, round(256 - 128 * abs(s))))),
    "solarize_add": _whole(_solarize_add),
    "color": _whole(lambda image, s: ImageEnhance.Color(image).enhance(_factor(s))),
    "contrast": _whole(lambda image, s: ImageEnhance.Contrast(image).enhance(_factor(s))),
    "brightness": _whole(lambda image, s: ImageEnhance.Brightness(image).enhance(_factor(s))),
    "sharpness": _each(lambda image, s: ImageEnhance.Sharpness(image).enhance(_factor(s))),
    "rotate": _each(_rotate),
    "shear_x": _each(lambda image, s: _affine(image, (1.0, 0.3 * s, 0.0, 0.0, 1.0, 0.0))),
    "shear_y": _each(lambda image, s: _affine(image, (1.0, 0.0, 0.0, 0.3 * s, 1.0, 0.0))),
    "translate_x": _each(lambda image, s: _affine(image, (1.0, 0.0, 0.45 * s * image.width, 0.0, 1.0, 0.0))),
    "translate_y": _each(lambda image, s: _affine(image, (1.0, 0.0, 0.0, 0.0, 1.0, 0.45 * s * image.height))),
}
"""By name; full strength: 30 degrees, shear 0.3, shift by 45 % (100 of 224 pixels), factors 0.1 and 1.9,
4 bits, solarisation from 128."""
