"""Random crops and flips, the fixed views of evaluation, and resizing of uint8 pixels."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray

from framework.data.randomness import Draws
from framework.data.video import Box
from framework.recipe.schema import Augment, ScaleJitter

__all__ = ["random_box", "resize", "view_boxes"]

_TRIES = 10


def random_box(draws: Draws, height: int, width: int, augment: Augment, size: int = 0) -> Box:
    """A crop of random area and aspect ratio (Szegedy et al. 2015, "Going deeper", §6), in pixels.

    The area is uniform in `crop_area` x the frame, the logarithm of width / height uniform in `crop_ratio`.
    After ten boxes that do not fit, the middle of the frame with the nearest allowed ratio. With
    `scale_jitter`, a square instead: what a crop of `size` pixels is when the short side has a random length.
    """
    if augment.scale_jitter is not None:
        return _scaled_square(draws, height, width, augment.scale_jitter, size)
    low, high = (math.log(ratio) for ratio in augment.crop_ratio)
    for _ in range(_TRIES):
        area = draws.uniform(*augment.crop_area) * height * width
        ratio = math.exp(draws.uniform(low, high))
        box_width, box_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            top = draws.integer(height - box_height + 1)
            left = draws.integer(width - box_width + 1)
            return Box(top, left, box_height, box_width)
    ratio = min(max(width / height, augment.crop_ratio[0]), augment.crop_ratio[1])
    box_width = max(1, min(width, round(height * ratio)))
    box_height = max(1, min(height, round(width / ratio)))
    return Box((height - box_height) // 2, (width - box_width) // 2, box_height, box_width)


def _scaled_square(draws: Draws, height: int, width: int, jitter: ScaleJitter, size: int) -> Box:
    """A square somewhere in the frame, at most as large as its short side."""
    short = min(height, width)
    scale = draws.uniform(*jitter.scale)
    side = max(1, min(short, round(short * size / (jitter.short_side * scale))))
    top, left = draws.integer(height - side + 1), draws.integer(width - side + 1)
    return Box(top, left, side, side)


def view_boxes(height: int, width: int, views: int) -> list[Box]:
    """Squares of the short side: the middle one, or three from one end of the long side to the other."""
    side = min(height, width)
    long = max(height, width) - side
    starts = [long // 2] if views == 1 else [round(view * long / (views - 1)) for view in range(views)]
    return [Box(start, 0, side, side) if height > width else Box(0, start, side, side) for start in starts]


def resize(frames: NDArray[np.uint8], size: int, out: NDArray[np.uint8] | None = None) -> NDArray[np.uint8]:
    """Bilinear with antialiasing: (n, height, width, 3) to (n, size, size, 3).

    The result is written into `out`, which is returned; by default it is new memory, or `frames` themselves
    where they have that size.

    Errors:
        ValueError: `out` has not as many rows of that size.
    """
    if out is not None and out.shape != (len(frames), size, size, 3):  # torch would take other memory
        raise ValueError(f"{len(frames)} frames of {size}x{size} do not go into rows of {out.shape}")
    if frames.shape[1:3] == (size, size):
        if out is None:
            return frames
        out[...] = frames
        return out
    if out is None:
        out = np.empty((len(frames), size, size, 3), np.uint8)
    # Channels last is how the frames lie; torch then takes its 8-bit integer path, 5 times as fast as Pillow.
    # It is the operator behind `interpolate(mode="bilinear", antialias=True)`, which itself takes no `out`.
    pixels, resized = (torch.from_numpy(one).permute(0, 3, 1, 2) for one in (frames, out))
    torch.ops.aten._upsample_bilinear2d_aa.out(pixels, [size, size], False, None, None, out=resized)
    return out
