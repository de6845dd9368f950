"""Promises of crops, views, resizing and RandAugment."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from framework.data.augment import random_box, resize, view_boxes
from framework.data.randaugment import OPERATIONS, rand_augment
from framework.data.randomness import Draws
from framework.recipe.schema import Augment, RandAugment

SIDES = st.integers(1, 3000)


@given(SIDES, SIDES, st.integers(0, 2**64 - 1))
def test_boxes_lie_inside_the_frame(height: int, width: int, seed: int) -> None:
    top, left, box_height, box_width = random_box(Draws(seed, "crop"), height, width, Augment())
    assert 0 <= top <= top + box_height <= height
    assert 0 <= left <= left + box_width <= width
    assert box_height > 0
    assert box_width > 0


def test_boxes_have_the_area_and_ratio_asked_for() -> None:
    augment = Augment(crop_area=(0.25, 0.5), crop_ratio=(0.75, 4 / 3))
    boxes = [random_box(Draws(seed, "crop"), 480, 640, augment) for seed in range(1000)]
    areas = np.array([box.height * box.width / (480 * 640) for box in boxes])
    ratios = np.array([box.width / box.height for box in boxes])
    assert 0.248 < areas.min() < 0.26
    assert 0.49 < areas.max() < 0.502
    assert areas.mean() == pytest.approx(0.375, abs=0.01)
    assert 0.74 < ratios.min() < ratios.max() < 1.35
    assert np.log(ratios).mean() == pytest.approx(0.0, abs=0.02)


def test_the_whole_frame_can_be_asked_for() -> None:
    augment = Augment(crop_area=(1.0, 1.0), crop_ratio=(1.0, 1.0))
    assert random_box(Draws(0, "crop"), 32, 32, augment) == (0, 0, 32, 32)


def test_a_frame_that_no_box_fits_gives_its_middle() -> None:
    box = random_box(Draws(0, "crop"), 10, 1000, Augment(crop_area=(0.9, 1.0)))
    assert (box.top, box.height) == (0, 10)
    assert box.width == math.floor(10 * 1.3333)
    assert box.left == (1000 - box.width) // 2


def test_views_cover_the_long_side() -> None:
    assert view_boxes(90, 200, 3) == [(0, 0, 90, 90), (0, 55, 90, 90), (0, 110, 90, 90)]
    assert view_boxes(200, 90, 3) == [(0, 0, 90, 90), (55, 0, 90, 90), (110, 0, 90, 90)]
    assert view_boxes(90, 200, 1) == [(0, 55, 90, 90)]


@pytest.mark.parametrize("shape", [(3, 80, 100), (1, 80, 100), (2, 20, 30), (2, 32, 32)])
def test_resize_is_antialiased_bilinear(shape: tuple[int, int, int], helpers) -> None:  # type: ignore[no-untyped-def]
    frames = helpers.moving_frames(*shape)
    cut = frames[:, 3:, 5:]
    resized = resize(cut, 32)
    assert resized.shape == (shape[0], 32, 32, 3)
    expected = [np.asarray(Image.fromarray(f).resize((32, 32), Image.Resampling.BILINEAR)) for f in cut]
    assert np.abs(resized.astype(int) - np.stack(expected)).max() <= 1


@pytest.fixture(scope="module")
def clip(helpers) -> np.ndarray:  # type: ignore[no-untyped-def]
    frame = helpers.moving_frames(1, 48, 48)[0]
    return np.repeat(frame[None], 4, axis=0)


@pytest.mark.parametrize("name", sorted(OPERATIONS))
@pytest.mark.parametrize("strength", [1.0, -1.0, 3.0])
def test_operations_treat_all_frames_alike(name: str, strength: float, clip: np.ndarray) -> None:
    result = OPERATIONS[name](clip, strength)
    assert result.shape == clip.shape
    assert result.dtype == np.uint8
    assert (result == result[:1]).all(), "equal frames must stay equal"
    assert not np.array_equal(result, clip)


@pytest.mark.parametrize("name", sorted(set(OPERATIONS) - {"auto_contrast", "equalize", "invert"}))
def test_no_strength_leaves_pixels_alone(name: str, clip: np.ndarray) -> None:
    np.testing.assert_array_equal(OPERATIONS[name](clip, 0.0), clip)


def test_geometry_is_about_the_middle(helpers) -> None:  # type: ignore[no-untyped-def]
    frame = np.zeros((1, 33, 33, 3), np.uint8)
    frame[0, 16, 16] = 255
    for name in ("rotate", "shear_x", "shear_y"):
        assert OPERATIONS[name](frame, 1.0)[0, 16, 16].min() > 128, name
    moved = OPERATIONS["translate_x"](frame, 10 / (0.45 * 33))
    assert np.unravel_index(moved[0, :, :, 0].argmax(), (33, 33))[0] == 16


def test_rand_augment_is_a_function_of_its_seed(clip: np.ndarray) -> None:
    settings = RandAugment(layers=2, magnitude=10)
    results = [rand_augment(clip, settings, Draws(seed, "randaugment")) for seed in range(12)]
    again = [rand_augment(clip, settings, Draws(seed, "randaugment")) for seed in range(12)]
    for one, other in zip(results, again, strict=True):
        np.testing.assert_array_equal(one, other)
    assert len({result.tobytes() for result in results}) > 8
