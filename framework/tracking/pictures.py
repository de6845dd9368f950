"""Contact sheets: what went into the model and what came out, for the eye.

Drawn with Pillow and not with matplotlib, whose first import builds a font cache for many seconds while the
other ranks wait.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from framework.data.labels import chosen_classes, label_text
from framework.files import replace_file

if TYPE_CHECKING:
    from framework.data.loader import Batch
    from framework.data.sources import OpenSource

__all__ = ["SAMPLES", "Tile", "batch_sheet", "contact_sheet", "spread_frames"]

logger = logging.getLogger(__name__)

SAMPLES = 16
FRAMES = 4
NARROWEST_CELL = 180
WIDEST_LABEL = 320
"""Pixels, so that names have room below single small frames."""
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
BACKGROUND, TEXT, RIGHT, WRONG = "#ffffff", "#1f2933", "#1a7f37", "#cf222e"


@dataclass(frozen=True)
class Tile:
    """One sample of a sheet."""

    frames: NDArray[np.uint8]
    """(frames, height, width, 3)"""
    label: str
    prediction: str | None = None
    """None where nothing was predicted, as for a training batch."""


def contact_sheet(tiles: Sequence[Tile], path: Path, title: str, frame_pixels: int = 112) -> Path:
    """Draw samples in a grid: frames in a row, the true class below, the predicted one in green or red.

    Frames are enlarged or reduced to `frame_pixels` in height. The PNG is written so that a reader sees the
    old or the new one; returns its path.

    Errors:
        ValueError: no tiles.
        OSError: the file cannot be written.
    """
    if not tiles:
        raise ValueError("a contact sheet needs at least one sample")
    strips = [_strip(tile.frames, frame_pixels) for tile in tiles]
    font, large, line = _font(13), _font(15), 18
    longest = min(max(font.getlength(tile.label) for tile in tiles), WIDEST_LABEL)
    cell = max(*(strip.width for strip in strips), NARROWEST_CELL, math.ceil(longest))
    columns = max(1, min(len(tiles), 960 // (cell + 12)))
    rows = -(-len(tiles) // columns)
    height = frame_pixels + 2 * line + 14
    width = max(columns * (cell + 12) + 12, math.ceil(large.getlength(title)) + 24)
    sheet = Image.new("RGB", (width, rows * height + 40), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    draw.text((12, 10), title, fill=TEXT, font=large)
    for number, (tile, strip) in enumerate(zip(tiles, strips, strict=True)):
        left, top = 12 + number % columns * (cell + 12), 40 + number // columns * height
        sheet.paste(strip, (left, top))
        draw.text((left, top + frame_pixels + 2), _fit(tile.label, font, cell), fill=TEXT, font=font)
        if tile.prediction is not None:
            color = RIGHT if tile.prediction == tile.label else WRONG
            text = _fit(f"predicted: {tile.prediction}", font, cell)
            draw.text((left, top + frame_pixels + 2 + line), text, fill=color, font=font)
    return _save(sheet, path)


def batch_sheet(run: Path, step: int, batch: Batch, sources: Mapping[str, OpenSource]) -> list[Path]:
    """Picture the first samples of a training batch as the model gets them, one sheet per source.

    A picture that cannot be drawn or written is a warning: it must not end a run.
    """
    written = []
    for name, group in batch.groups.items():
        opened = sources[name]
        pixels = group.pixels[:SAMPLES].cpu().numpy()  # (batch, 3, frames, height, width)
        tiles = [
            Tile(
                spread_frames(sample),
                label_text(opened.dataset, chosen_classes(opened.source.targets, label)),
            )
            for sample, label in zip(pixels, group.labels[:SAMPLES], strict=True)
        ]
        path = run / "pictures" / f"training-{name}.png"
        try:
            written.append(contact_sheet(tiles, path, f"{name}: training samples of step {step + 1}"))
        except (OSError, ValueError) as error:
            logger.warning("the picture %s could not be written: %s", path, error)
    return written


def spread_frames(sample: NDArray[np.uint8], count: int = FRAMES) -> NDArray[np.uint8]:
    """At most `count` frames spread over a clip: (3, frames, h, w) -> (count, h, w, 3)."""
    frames = sample.shape[1]
    chosen = np.linspace(0, frames - 1, min(count, frames)).round().astype(int)
    return np.ascontiguousarray(sample[:, chosen].transpose(1, 2, 3, 0))


def _strip(frames: NDArray[np.uint8], height: int) -> Image.Image:
    """Frames side by side."""
    width = round(frames.shape[2] * height / frames.shape[1])
    way = Image.Resampling.BOX if height < frames.shape[1] else Image.Resampling.NEAREST
    strip = Image.new("RGB", (len(frames) * (width + 2) - 2, height), BACKGROUND)
    for number, frame in enumerate(frames):
        strip.paste(Image.fromarray(frame).resize((width, height), way), (number * (width + 2), 0))
    return strip


@functools.cache
def _font(pixels: int) -> Font:
    """DejaVu Sans, for class names in many scripts, where matplotlib is installed (MLflow brings it)."""
    found = importlib.util.find_spec("matplotlib")
    for folder in (found.submodule_search_locations if found else None) or ():
        path = Path(folder) / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"
        if path.is_file():
            return ImageFont.truetype(str(path), pixels)
    return ImageFont.load_default(pixels)


def _fit(text: str, font: Font, width: int) -> str:
    """The text, or as much of its beginning as fits into `width` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text}…"


def _save(sheet: Image.Image, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, lambda file: sheet.save(file, format="PNG", optimize=True))
    return path
