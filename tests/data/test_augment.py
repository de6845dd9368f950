"""Promises of crops, views, resizing and RandAugment."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from framework.data.augment import random_box, resize, view_boxes
from framework.data.color import color_jitter
from framework.data.randaugment import OPERATIONS, rand_augment
from framework.data.randomness import Draws
from framework.recipe.schema import Augment, ColorJitter, RandAugment, ScaleJitter

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


@pytest.mark.parametrize("shape", [(3, 80, 100), (1, 1, 30), (2, 20, 1), (2, 32, 32)])
def test_resizing_into_given_rows_writes_these_and_no_others(shape: tuple[int, int, int]) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    out = np.full((shape[0] + 2, 32, 32, 3), 7, np.uint8)
    assert np.shares_memory(resize(frames, 32, out[1:-1]), out)
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(pixels, size=(32, 32), mode="bilinear", antialias=True)
    assert np.array_equal(out[1:-1], expected.permute(0, 2, 3, 1).numpy())
    assert (out[[0, -1]] == 7).all()
    with pytest.raises(ValueError, match="rows"):
        resize(frames, 32, out)


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


def clip_of_colours() -> np.ndarray:
    """Five frames that are all alike, in many colours."""
    frame = np.random.default_rng(3).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    return np.stack([frame] * 5)


def test_colours_change_alike_in_all_frames_and_by_the_seed() -> None:
    frames, settings = clip_of_colours(), ColorJitter(probability=1.0)
    changed = color_jitter(frames, settings, Draws(1, "color_jitter"))
    assert changed.shape == frames.shape
    assert all(np.array_equal(frame, changed[0]) for frame in changed)
    assert not np.array_equal(changed, frames)
    assert np.array_equal(changed, color_jitter(frames, settings, Draws(1, "color_jitter")))
    assert not np.array_equal(changed, color_jitter(frames, settings, Draws(2, "color_jitter")))


def test_how_often_colours_change_and_drop() -> None:
    frames = clip_of_colours()[:1]
    settings = ColorJitter(probability=0.8, drop=0.1)
    results = [color_jitter(frames, settings, Draws(seed, "color_jitter")) for seed in range(400)]
    same = np.mean([np.array_equal(result, frames) for result in results])
    grey = np.mean([(result == result[..., :1]).all() for result in results])
    assert same == pytest.approx(0.2 * 0.9, abs=0.06)
    assert grey == pytest.approx(0.1, abs=0.04)


@pytest.mark.parametrize("only", ["brightness", "saturation", "contrast", "hue"])
def test_each_change_does_what_it_is_called(only: str) -> None:
    nothing = {"brightness": 0, "saturation": 0, "contrast": 0, "hue": 0, "drop": 0, "probability": 1}
    frames = clip_of_colours() // 2 + 64
    still = color_jitter(frames, ColorJitter.model_validate(nothing), Draws(4, "color_jitter"))
    assert np.abs(still.astype(int) - frames).max() <= 6, "HSV and back is not exact"
    changed = color_jitter(
        frames, ColorJitter.model_validate({**nothing, only: 0.3}), Draws(4, "color_jitter")
    )
    assert np.abs(changed.astype(int) - still).mean() > 1
    value, before = changed.astype(float), still.astype(float)
    if only == "brightness":
        assert (value - before).std() < 3
    if only == "hue":
        assert np.abs(value.max(axis=-1) - before.max(axis=-1)).max() <= 6, (
            "the brightest colour stays as bright"
        )
    if only == "contrast":
        assert value.mean() == pytest.approx(before.mean(), abs=2)
    if only == "saturation":
        assert np.ptp(value, axis=-1).mean() != pytest.approx(np.ptp(before, axis=-1).mean(), rel=0.02)


def test_a_jittered_scale_gives_squares_of_the_sizes_asked_for() -> None:
    augment = Augment(scale_jitter=ScaleJitter(short_side=256, scale=(0.9, 1.33)))
    boxes = [random_box(Draws(seed, "crop"), 480, 640, augment, 224) for seed in range(1000)]
    sides = np.array([box.height for box in boxes])
    assert all(box.height == box.width for box in boxes)
    assert sides.min() == pytest.approx(480 * 224 / (256 * 1.33), abs=2)
    assert sides.max() == pytest.approx(480 * 224 / (256 * 0.9), abs=2)
    assert max(box.top + box.height for box in boxes) <= 480
    assert max(box.left + box.width for box in boxes) <= 640
    assert len({(box.top, box.left) for box in boxes}) > 900


def test_a_jittered_scale_never_leaves_the_frame() -> None:
    augment = Augment(scale_jitter=ScaleJitter(short_side=100, scale=(0.5, 0.5)))
    assert random_box(Draws(0, "crop"), 90, 90, augment, 224) == (0, 0, 90, 90)
    with pytest.raises(ValueError, match="smaller number first"):
        ScaleJitter(scale=(1.3, 0.9))
