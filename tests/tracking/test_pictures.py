"""Contact sheets show the frames, and the right and wrong predictions in their colours."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageColor

from framework.tracking.pictures import RIGHT, WRONG, Tile, contact_sheet, spread_frames


def colors(path: Path) -> set[tuple[int, ...]]:
    image = Image.open(path).convert("RGB")
    return {tuple(color) for color in np.asarray(image).reshape(-1, 3)}


def test_frames_and_both_colours_are_drawn(tmp_path: Path) -> None:
    red, blue = np.zeros((2, 28, 28, 3), np.uint8), np.zeros((1, 28, 28, 3), np.uint8)
    red[..., 0], blue[..., 2] = 250, 250
    path = contact_sheet(
        [Tile(red, "up", "up"), Tile(blue, "down", "left")], tmp_path / "pictures" / "sheet.png", "title"
    )
    found = colors(path)
    assert {(250, 0, 0), (0, 0, 250)} <= found
    assert ImageColor.getrgb(RIGHT) in found
    assert ImageColor.getrgb(WRONG) in found
    assert [path.name for path in path.parent.iterdir()] == ["sheet.png"], "no temporary file is left"


def test_without_predictions_nothing_is_judged(tmp_path: Path) -> None:
    path = contact_sheet([Tile(np.zeros((1, 8, 8, 3), np.uint8), "up")], tmp_path / "sheet.png", "title")
    assert not {ImageColor.getrgb(RIGHT), ImageColor.getrgb(WRONG)} & colors(path)


@pytest.mark.parametrize("label", ["$x_{1$", "名前", "a" * 300, ""])
def test_any_class_name_can_be_drawn(tmp_path: Path, label: str) -> None:
    tile = Tile(np.zeros((1, 300, 200, 3), np.uint8), label, label)
    assert contact_sheet([tile] * 17, tmp_path / "sheet.png", "title").stat().st_size > 0


def test_frames_are_spread_over_the_clip() -> None:
    sample = np.broadcast_to(np.arange(16, dtype=np.uint8)[None, :, None, None], (3, 16, 4, 4))
    assert spread_frames(sample)[:, 0, 0, 0].tolist() == [0, 5, 10, 15]
    assert spread_frames(sample[:, :1]).shape == (1, 4, 4, 3)
