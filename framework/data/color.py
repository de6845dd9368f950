"""Colour jitter, the same change for all frames of a clip (Table 7 of ViViT, arXiv 2103.15691)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance

from framework.data.randomness import Draws
from framework.recipe.augment_sections import ColorJitter

__all__ = ["color_jitter"]

Pixels = NDArray[np.uint8]


def color_jitter(frames: Pixels, settings: ColorJitter, draws: Draws) -> Pixels:
    """Change the colours of a clip (n, height, width, 3) as the draws decide.

    Contrast is about the mean of the whole clip, so that brightness does not flicker. The number of draws is
    always the same: what one setting does cannot move the others.
    """
    changes = [
        ("brightness", settings.brightness * draws.uniform(-1, 1)),
        ("saturation", 1 + settings.saturation * draws.uniform(-1, 1)),
        ("contrast", 1 + settings.contrast * draws.uniform(-1, 1)),
        ("hue", settings.hue * draws.uniform(-1, 1)),
    ]
    order = draws.permutation(len(changes))
    jittered, dropped = draws.chance(settings.probability), draws.chance(settings.drop)
    if not jittered and not dropped:
        return frames
    count, height, width, _ = frames.shape
    tall = Image.fromarray(np.ascontiguousarray(frames).reshape(count * height, width, 3))
    for number in order if jittered else ():
        tall = _change(tall, *changes[number])
    if dropped:
        tall = tall.convert("L").convert("RGB")
    return np.asarray(tall).reshape(frames.shape)


def _change(image: Image.Image, what: str, amount: float) -> Image.Image:
    if what == "saturation":
        return ImageEnhance.Color(image).enhance(amount)
    if what == "contrast":
        return ImageEnhance.Contrast(image).enhance(amount)
    if what == "hue":
        hue, saturation, value = image.convert("HSV").split()
        shift = round(256 * amount)
        hue = hue.point([(level + shift) % 256 for level in range(256)])
        return Image.merge("HSV", (hue, saturation, value)).convert("RGB")
    table = [min(255, max(0, round(level + 255 * amount))) for level in range(256)]
    return image.point(table * 3)
