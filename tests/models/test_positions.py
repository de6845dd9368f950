"""Every way of telling a token its place: what it tells, where it is stored, and what it warns of."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor

from framework.errors import ModelError
from framework.models import InputSpec, build_model
from framework.models.positions import FixedPositions, LearnedPositions
from framework.models.tokenizer import TubeTokenizer
from framework.models.tubes import grids_of
from framework.recipe.schema import Model, Tube
from framework.recipe.tube_sets import PAPER_TUBES

TUBES = (
    Tube(kernel=(4, 8, 8), stride=(8, 16, 16), space_to_depth=(2, 1, 1)),
    Tube(kernel=(2, 6, 6), stride=(8, 16, 16), offset=(0, 8, 8)),
    Tube(kernel=(1, 8, 8), stride=(16, 8, 8)),
)
CPU = torch.device("cpu")


def embed(position: str, tubes: tuple[Tube, ...], clip: tuple[int, int, int], width: int = 96) -> Tensor:
    module = FixedPositions(tubes, width, position)  # type: ignore[arg-type]
    return module(grids_of(tubes, clip), CPU, torch.float32)


def test_without_stride_the_index_on_the_grid_is_all_that_counts() -> None:
    """Tokens of different tubes with one index share an embedding; with the stride they do not."""
    clip, sizes = (32, 224, 224), [98, 147, 98]
    plain = embed("fixed_no_stride", PAPER_TUBES, clip).split([*sizes, 196])
    assert torch.equal(plain[0], plain[2].view(2, 7, 7, -1).flatten(0, 2))
    assert torch.equal(plain[0][:49], plain[1][:49])
    fixed = embed("fixed", PAPER_TUBES, clip).split([*sizes, 196])
    assert not (fixed[0] == fixed[2]).all(dim=1).any()


def test_without_stride_offsets_and_strides_change_nothing() -> None:
    def patches(**changes: object) -> tuple[Tube, ...]:
        return (Tube.model_validate({"kernel": (1, 8, 8), "stride": (4, 8, 8), **changes}),)

    expected = embed("fixed_no_stride", patches(), (8, 32, 32))
    moved = patches(stride=(4, 6, 6), offset=(1, 6, 6))
    assert grids_of(moved, (8, 32, 32))[0].shape == (2, 4, 4)
    assert torch.equal(embed("fixed_no_stride", moved, (8, 32, 32)), expected)
    assert not torch.equal(embed("fixed", moved, (8, 32, 32)), embed("fixed", patches(), (8, 32, 32)))


def test_the_printed_formula_leaves_most_channels_alike() -> None:
    """Of 256 channels of the rows, how many tell tokens apart that lie 32 pixels from each other."""
    tube = (Tube(kernel=(8, 8, 8), stride=(16, 32, 32)),)

    def telling(position: str) -> int:
        embedding = embed(position, tube, (32, 224, 224), width=768).view(2, 7, 7, 128, 3, 2)
        return int(((embedding[0, 1:, 0, :, 1] - embedding[0, :-1, 0, :, 1]).abs().amax(0) > 1e-3).sum())

    assert telling("printed") <= 4
    assert telling("fixed") > 200


def test_the_printed_formula_warns(caplog: pytest.LogCaptureFixture) -> None:
    inputs = {"photos": InputSpec("image", 1, 32, 4)}
    options = {"name": "tubevit_ti", "depth": 1, "tubes": TUBES}
    with caplog.at_level(logging.WARNING):
        build_model(Model.model_validate(options), inputs)
        assert not caplog.records
        build_model(Model.model_validate({**options, "position": "printed"}), inputs)
    assert "degenerate" in caplog.text


def test_learned_tables_are_as_large_as_the_largest_clip() -> None:
    clips = [(16, 32, 32), (32, 32, 32), (1, 48, 64)]
    tokenizer = TubeTokenizer(TUBES, 48, position="learned", clips=clips)
    shapes = {
        name: tuple(value.shape) for name, value in tokenizer.state_dict().items() if "positions" in name
    }
    assert shapes == {
        "positions.tables.0.weight": (4, 2, 2, 48),
        "positions.tables.1.weight": (4, 2, 2, 48),
        "positions.tables.2.weight": (2, 6, 8, 48),
    }


def test_a_smaller_clip_takes_the_positions_of_the_same_places() -> None:
    clips = [(16, 32, 32), (1, 32, 48)]
    positions = LearnedPositions(TUBES, 48, [grids_of(TUBES, clip) for clip in clips])
    table = positions.tables["2"].weight
    found = positions(grids_of(TUBES, (1, 32, 32)), CPU, torch.float32)
    assert torch.equal(found, table[:1, :4, :4].flatten(0, 2))
    found.sum().backward()
    assert positions.tables["2"].weight.grad[:, :, 4:].abs().sum() == 0


def test_a_place_that_was_never_learned_names_the_tube() -> None:
    tokenizer = TubeTokenizer(TUBES, 48, position="learned", clips=[(16, 32, 32)])
    with pytest.raises(ModelError, match=r"tube 1 of 3 .* makes 4 tokens along the frames, but 2 positions"):
        tokenizer([torch.zeros(1, 3, 32, 32, 32)])


def test_learned_positions_are_spared_by_weight_decay() -> None:
    inputs = {"photos": InputSpec("image", 1, 32, 4)}
    options = {"name": "tubevit_ti", "depth": 1, "tubes": TUBES, "position": "learned"}
    model = build_model(Model.model_validate(options), inputs)
    assert "tokenizer.positions.tables.2.weight" in model.no_weight_decay()
