"""The loaders of another environment make the same clips as this project's, and their absence is told."""

from __future__ import annotations

import importlib.util
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import other_loaders
from benchmarks.contenders import AUGMENT, CLIP, COUNT, RATE, OtherLoader, other_versions
from benchmarks.loader import others
from framework.data.augment import random_box, resize
from framework.data.clips import random_clip
from framework.data.randomness import Draws

DRAWN = 4000
without_them = pytest.mark.skipif(
    importlib.util.find_spec("streaming") is not None, reason="this environment has the other loaders"
)


@pytest.mark.parametrize(("height", "width"), [(720, 1280), (256, 456), (300, 200)])
def test_crops_are_distributed_as_those_of_the_loader(height: int, width: int) -> None:
    random.seed(0)
    theirs = np.array([other_loaders.random_box(height, width) for _ in range(DRAWN)])
    boxes = [random_box(Draws(number, "test"), height, width, AUGMENT) for number in range(DRAWN)]
    ours = np.array([(box.top, box.left, box.height, box.width) for box in boxes])
    parts = np.linspace(0.05, 0.95, 19)
    for column, side in enumerate((height, width, height, width)):
        found, expected = (np.quantile(values[:, column], parts) for values in (theirs, ours))
        np.testing.assert_allclose(found, expected, atol=0.035 * side)
    areas = [np.quantile(values[:, 2] * values[:, 3], parts) for values in (theirs, ours)]
    np.testing.assert_allclose(*areas, atol=0.02 * height * width)


@pytest.mark.parametrize(("height", "width"), [(10, 400), (400, 10)])
def test_where_no_crop_fits_it_is_the_middle(height: int, width: int) -> None:
    box = random_box(Draws(0, "test"), height, width, AUGMENT)
    assert other_loaders.random_box(height, width) == (box.top, box.left, box.height, box.width)


def test_clips_start_wherever_those_of_the_loader_do() -> None:
    random.seed(0)
    theirs = {tuple(other_loaders.random_frames()) for _ in range(DRAWN)}
    assert theirs == {tuple(random_clip(CLIP, COUNT, RATE, Draws(one, "test"))) for one in range(DRAWN)}


def test_frames_are_resized_alike() -> None:
    frames = np.random.default_rng(0).integers(0, 255, (3, 180, 260, 3), dtype=np.uint8)
    found = other_loaders.crop(frames, (10, 20, 150, 200))
    expected = resize(np.ascontiguousarray(frames[:, 10:160, 20:220]), other_loaders.SIZE)
    assert torch.equal(found, torch.from_numpy(expected))


@without_them
def test_an_environment_that_lacks_them_is_named_with_what_to_do() -> None:
    with pytest.raises(SystemExit) as told:
        other_versions(Path(sys.executable))
    for part in (sys.executable, "not installed: megatron-energon, mosaicml-streaming", "make other-loaders"):
        assert part in str(told.value)


def test_an_interpreter_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"No such file or directory; `make other-loaders`"):
        other_versions(tmp_path / "python")


@without_them
def test_a_loader_that_ends_is_named(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="Megatron-Energon has ended with 1"):
        OtherLoader(Path(sys.executable), other_loaders.ENERGON, tmp_path)


def test_without_an_interpreter_they_are_not_timed() -> None:
    assert others(None) == {
        "Megatron-Energon": "not timed: give --others",
        "MosaicML Streaming": "not timed: give --others",
    }
