"""Pictures of the tokenizer: they show the weights, the pixels and the positions that the model has."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch

from framework.evaluation.anatomy import coverage_tiles, kernel_tiles, position_tiles
from framework.models.coverage import coverage
from framework.models.inputs import InputSpec
from framework.models.registry import build_tokenizer
from framework.models.tokenizer import TubeTokenizer
from framework.recipe.schema import Model, Position, Tube

Kernels = Literal["independent", "interpolated"]
VIDEO, IMAGE = InputSpec("video", 8, 32, 3), InputSpec("image", 1, 32, 3)
TUBES = (
    Tube(kernel=(4, 8, 8), stride=(8, 16, 16), space_to_depth=(2, 1, 1)),
    Tube(kernel=(1, 16, 16), stride=(8, 16, 16)),
)


def tokenizer(
    position: Position = "fixed", kernels: Literal["independent", "interpolated"] = "independent"
) -> TubeTokenizer:
    """A small one, always with the same weights."""
    torch.manual_seed(0)
    model = Model(name="tubevit_ti", width=48, heads=2, tubes=TUBES, position=position, kernels=kernels)
    return build_tokenizer(model, {"clips": VIDEO, "images": IMAGE})


@torch.no_grad()
@pytest.mark.parametrize("kernels", ["independent", "interpolated"])
def test_kernels_are_shown_strongest_first_around_grey(
    kernels: Literal["independent", "interpolated"],
) -> None:
    built = tokenizer(kernels=kernels)
    patches = built.tubes[1].weight
    assert isinstance(patches, torch.Tensor)
    patches[7] *= 10
    patches[7, :, 0, 0, 0] = 0
    tiles = kernel_tiles(built, 1)
    assert tiles[0].label == "kernel 7"
    assert tiles[0].frames.shape == (1, 16, 16, 3)
    assert tiles[0].frames[0, 0, 0].tolist() == [128, 128, 128], "zero is grey"
    assert {int(tiles[0].frames.min()), int(tiles[0].frames.max())} & {0, 255}, "the largest weight is full"
    assert kernel_tiles(built, 0)[0].frames.shape == (4, 8, 8, 3)


def test_coverage_is_what_the_tubes_read() -> None:
    tiles = coverage_tiles(tokenizer(), VIDEO)
    share = coverage(TUBES, (8, 32, 32))
    assert tiles[-1].label == f"all 2: {share:.1%} read"
    # tube 1 reads 8x8 of every 16x16 pixels, in frames 0 to 7
    blue = (tiles[0].frames != tiles[0].frames[0, 8, 8]).any(axis=-1)
    expected = np.zeros((8, 32, 32), bool)
    for top in (0, 16):
        for left in (0, 16):
            expected[:, top : top + 8, left : left + 8] = True
    assert (blue == expected).all()
    assert len(coverage_tiles(tokenizer(), IMAGE)) == 2, "images meet one tube"


@pytest.mark.parametrize("position", ["fixed", "learned", "fixed_no_stride", "printed"])
def test_positions_are_most_alike_to_themselves(position: Position) -> None:
    with torch.no_grad():
        tiles = position_tiles(tokenizer(position), VIDEO)
    assert [tile.frames.shape[:3] for tile in tiles] == [(1, 2, 2), (1, 2, 2)]
    darkest = tiles[1].frames.sum(axis=-1)
    assert darkest[0, 1, 1] == darkest.min(), "the token in the middle"
