"""Tubes: the token counts of the paper, equality with convolution, positions, errors that name the tube."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from framework.errors import ModelError
from framework.models.positions import FixedPositions, sincos
from framework.models.tokenizer import TubeTokenizer
from framework.models.tubes import AXES, centres, cut, grids_of, sub_stride
from framework.recipe.schema import Tube
from framework.recipe.tube_sets import PAPER_TUBES

DENSE_2D = PAPER_TUBES[3].model_copy(update={"stride": (16, 16, 16)})
SMALL_TUBES = (
    Tube(kernel=(4, 8, 8), stride=(8, 16, 16), space_to_depth=(2, 1, 1)),
    Tube(kernel=(8, 4, 4), stride=(3, 16, 16), offset=(2, 4, 4), space_to_depth=(1, 2, 2)),
    Tube(kernel=(2, 6, 6), stride=(8, 16, 16), offset=(0, 8, 8)),
    Tube(kernel=(1, 8, 8), stride=(16, 8, 8)),
    Tube(kernel=(2, 2, 2), stride=(8, 4, 8), space_to_depth=(4, 1, 2)),
)


def count(tubes: tuple[Tube, ...], clip: tuple[int, int, int]) -> int:
    return sum(grid.tokens for grid in grids_of(tubes, clip))


@pytest.mark.parametrize(
    ("tubes", "clip", "tokens"),
    [
        (PAPER_TUBES, (32, 224, 224), 98 + 147 + 98 + 196),
        ((*PAPER_TUBES[:3], DENSE_2D), (32, 224, 224), 735),  # "every 16th frame", §3.2
        (PAPER_TUBES, (64, 224, 224), 1176),  # the frames of Table 10
        (PAPER_TUBES, (1, 224, 224), 196),
        ((DENSE_2D,), (32, 224, 224), 392),
    ],
)
def test_token_counts_of_the_paper(tubes: tuple[Tube, ...], clip: tuple[int, int, int], tokens: int) -> None:
    assert count(tubes, clip) == tokens


def test_token_counts_539_735_1176() -> None:
    dense = (*PAPER_TUBES[:3], DENSE_2D)
    assert [count(PAPER_TUBES, (32, 224, 224)), count(dense, (32, 224, 224))] == [539, 735]
    assert count(PAPER_TUBES, (64, 224, 224)) == 1176


def convolve(clip: Tensor, tube: Tube, weight: Tensor, bias: Tensor) -> Tensor:
    """The tokens of one tube by convolution, then Space-to-Depth, as §3.4 describes them."""
    time, height, width = tube.offset
    grid = F.conv3d(clip[:, :, time:, height:, width:], weight, bias, stride=sub_stride(tube))
    f_t, f_h, f_w = tube.space_to_depth
    return rearrange(
        grid,
        "b c (t ft) (h fh) (w fw) -> b (t h w) (ft fh fw c)",
        ft=f_t,
        fh=f_h,
        fw=f_w,
    )


@pytest.mark.parametrize("tubes", [PAPER_TUBES, (*PAPER_TUBES[:3], DENSE_2D)], ids=["paper", "dense"])
def test_tokenizer_is_a_convolution_of_the_paper_s_tubes(tubes: tuple[Tube, ...]) -> None:
    assert_equals_convolution(tubes, torch.randn(1, 3, 32, 224, 224), width=96)


@pytest.mark.parametrize("clip", [(16, 48, 32), (16, 32, 48), (32, 64, 32)])
def test_tokenizer_is_a_convolution_on_other_clips(clip: tuple[int, int, int]) -> None:
    assert_equals_convolution(SMALL_TUBES, torch.randn(2, 3, *clip), width=48)


def assert_equals_convolution(tubes: tuple[Tube, ...], clip: Tensor, width: int) -> None:
    torch.manual_seed(0)
    tokenizer = TubeTokenizer(tubes, width, position="none")
    for projection in tokenizer.tubes:
        torch.nn.init.normal_(projection.bias)
    expected = torch.cat(
        [
            convolve(clip, tube, projection.weight, projection.bias)
            for tube, projection in zip(tubes, tokenizer.tubes, strict=True)
        ],
        dim=1,
    )
    torch.testing.assert_close(tokenizer([clip]), expected.flatten(0, 1), atol=1e-5, rtol=1e-5)


def test_tokens_of_all_tubes_start_at_one_scale() -> None:
    torch.manual_seed(0)
    tokenizer, clip = TubeTokenizer(PAPER_TUBES, 192, position="none"), torch.randn(1, 3, 32, 224, 224)
    parts = tokenizer([clip]).split([grid.tokens for grid in grids_of(PAPER_TUBES, (32, 224, 224))])
    scales = torch.stack([part.std() for part in parts])
    assert (scales / scales.mean() - 1).abs().max() < 0.05


def test_weights_have_the_shape_of_convolutions() -> None:
    state = TubeTokenizer(PAPER_TUBES, 1280).state_dict()
    assert {name: tuple(value.shape) for name, value in state.items()} == {
        "tubes.0.weight": (640, 3, 8, 8, 8),
        "tubes.0.bias": (640,),
        "tubes.1.weight": (320, 3, 16, 4, 4),
        "tubes.1.bias": (320,),
        "tubes.2.weight": (1280, 3, 4, 12, 12),
        "tubes.2.bias": (1280,),
        "tubes.3.weight": (1280, 3, 1, 16, 16),
        "tubes.3.bias": (1280,),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_brought_to_minus_one_to_one(dtype: torch.dtype) -> None:
    clip = torch.arange(256, dtype=torch.uint8).view(1, 1, 1, 16, 16).expand(1, 3, 1, 16, 16)
    tube = Tube(kernel=(1, 1, 1), stride=(1, 1, 1))
    tokenizer = TubeTokenizer((tube,), 3, position="none")
    with torch.no_grad():
        tokenizer.tubes[0].weight.copy_(torch.eye(3).view(3, 3, 1, 1, 1))
    tokens = tokenizer.to(dtype)([clip])
    exact = (torch.arange(256, dtype=torch.float64) / 255 * 2 - 1).to(dtype)
    torch.testing.assert_close(tokens, exact.unsqueeze(1).expand(256, 3), atol=1e-7, rtol=1e-2)
    assert tokens.min() == -1
    assert tokens.max() == 1


def test_cut_copies_only_what_tubes_read() -> None:
    clip = torch.zeros(1, 3, 32, 224, 224, dtype=torch.uint8)
    grids = grids_of(PAPER_TUBES, (32, 224, 224))
    copied = sum(cut(clip, PAPER_TUBES[grid.tube], grid.shape).numel() for grid in grids)
    assert copied / clip.numel() == pytest.approx(0.223, abs=0.001)


def reference_position(centre: tuple[float, float, float], width: int) -> list[float]:
    """Equations 3 to 7 of the paper in plain loops; the exponent is divided by the number of frequencies."""
    values = [0.0] * width
    for j in range(width // 6):
        omega = 1 / 10_000 ** (j / (width // 6))
        for axis in range(3):
            values[6 * j + 2 * axis] = math.sin(centre[axis] * omega)
            values[6 * j + 2 * axis + 1] = math.cos(centre[axis] * omega)
    return values


@pytest.mark.parametrize("width", [192, 768, 1024, 1280])
def test_positions_follow_the_formula(width: int) -> None:
    points = [(0.5, 8.0, 216.0), (8.0, 4.0, 196.0), (63.5, 100.0, 50.0)]
    expected = torch.tensor([reference_position(point, width) for point in points])
    torch.testing.assert_close(sincos(torch.tensor(points), width), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("width", "rest"), [(768, 0), (1024, 4), (1280, 2)])
def test_channels_that_six_does_not_divide_are_zero(width: int, rest: int) -> None:
    embedding = sincos(torch.rand(5, 3) * 200, width)
    assert not embedding[:, width - rest :].any()
    assert (embedding[:, : width - rest] != 0).any(dim=0).all()


@pytest.mark.parametrize("tube", [*PAPER_TUBES, *SMALL_TUBES])
def test_centre_is_that_of_the_union_of_sub_tubes(tube: Tube) -> None:
    clip = (64, 224, 320)
    (grid,) = (grid for grid in grids_of((tube, PAPER_TUBES[3]), clip) if grid.tube == 0)
    steps, points = sub_stride(tube), iter(centres(tube, grid.shape).tolist())
    for place in [
        (t, h, w) for t in range(grid.shape[0]) for h in range(grid.shape[1]) for w in range(grid.shape[2])
    ]:
        expected = []
        for axis in range(3):
            factor = tube.space_to_depth[axis]
            starts = [(place[axis] * factor + i) * steps[axis] + tube.offset[axis] for i in range(factor)]
            expected.append((min(starts) + max(starts) + tube.kernel[axis]) / 2)
        assert next(points) == expected


@pytest.mark.parametrize("frames", [1, 32, 64])
def test_all_tokens_of_a_clip_have_their_own_position(frames: int) -> None:
    positions = FixedPositions(PAPER_TUBES, 768, "fixed")
    grids = grids_of(PAPER_TUBES, (frames, 224, 224))
    embedding = positions(grids, torch.device("cpu"), torch.float32)
    distances = torch.cdist(embedding, embedding) + 1e9 * torch.eye(len(embedding))
    assert distances.min() > 0.05
    assert len(embedding) == count(PAPER_TUBES, (frames, 224, 224))


def test_height_and_width_are_not_swapped() -> None:
    tube = Tube(kernel=(1, 8, 8), stride=(1, 8, 8))
    tokenizer = TubeTokenizer((tube,), 12)
    with torch.no_grad():
        for parameter in tokenizer.parameters():
            parameter.zero_()
    tokens = tokenizer([torch.zeros(1, 3, 1, 16, 24)]).view(2, 3, 12)  # (rows, columns, width)
    rows, columns = tokens[..., [2, 3, 8, 9]], tokens[..., [4, 5, 10, 11]]
    assert torch.equal(rows, rows[:, :1].expand_as(rows))
    assert torch.equal(columns, columns[:1].expand_as(columns))
    expected = torch.tensor(
        [[reference_position((0.5, 4 + 8 * y, 4 + 8 * x), 12) for x in range(3)] for y in range(2)]
    )
    torch.testing.assert_close(tokens, expected)


def test_positions_are_not_in_the_state_dict_and_follow_the_type() -> None:
    tokenizer = TubeTokenizer(SMALL_TUBES, 48)
    clip = torch.randint(0, 256, (1, 3, 16, 32, 32), dtype=torch.uint8)
    with torch.inference_mode():
        tokenizer([clip])
    assert set(tokenizer.state_dict()) == {name for name, _ in tokenizer.named_parameters()}
    tokenizer([clip]).square().sum().backward()  # what inference remembered serves training
    assert tokenizer.to(torch.bfloat16)([clip]).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("clip", "words"),
    [
        ((19, 224, 224), ["tube 2 of 4", "model.tubes[1]", "kernel 16x4x4", "19 frames", "at least 20"]),
        ((3, 224, 224), ["tube 1 of 4", "3 frames", "at least 8"]),
        (
            (32, 224, 240),
            ["tube 2 of 4", "pixels of width", "Space-to-Depth", "does not divide", "235 or 252"],
        ),
        ((24, 224, 224), ["tube 1 of 4", "24 frames", "3 sub-tubes", "factor 2", "23 or 32"]),
        ((1, 15, 224), ["tube 4 of 4", "15 pixels of height", "at least 16"]),
    ],
)
def test_a_clip_that_does_not_fit_names_the_tube(clip: tuple[int, int, int], words: list[str]) -> None:
    with pytest.raises(ModelError) as caught:
        grids_of(PAPER_TUBES, clip)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "clip", [(24, 224, 224), (32, 224, 240), (32, 208, 224), (5, 224, 224), (32, 9, 224)]
)
def test_lengths_that_an_error_proposes_work(clip: tuple[int, int, int]) -> None:
    with pytest.raises(ModelError) as caught:
        grids_of(PAPER_TUBES, clip)
    axis = next(axis for axis, words in enumerate(AXES) if words in str(caught.value))
    proposed = str(caught.value).rsplit(":", 1)[1].split(" or ")
    assert proposed
    for length in proposed:
        assert count(PAPER_TUBES, (*clip[:axis], int(length), *clip[axis + 1 :])) > 0


def test_tubes_that_no_length_suits() -> None:
    odd = Tube(kernel=(1, 8, 8), stride=(1, 16, 8), space_to_depth=(1, 2, 1))
    shifted = odd.model_copy(update={"offset": (0, 8, 0)})
    with pytest.raises(ModelError, match="no number of pixels of height"):
        grids_of((odd, shifted), (4, 24, 16))


@pytest.mark.parametrize(
    ("tube", "width", "words"),
    [
        (
            Tube(kernel=(8, 8, 8), stride=(15, 32, 32), space_to_depth=(2, 1, 1)),
            96,
            ["tube 2 of 2", "stride of 15"],
        ),
        (
            Tube(kernel=(8, 8, 8), stride=(16, 32, 32), space_to_depth=(2, 2, 2)),
            100,
            ["tube 2 of 2", "width of 100"],
        ),
    ],
)
def test_impossible_space_to_depth_names_the_tube(tube: Tube, width: int, words: list[str]) -> None:
    with pytest.raises(ModelError) as caught:
        TubeTokenizer((PAPER_TUBES[3], tube), width)
    for word in words:
        assert word in str(caught.value)


def test_images_need_a_flat_tube() -> None:
    with pytest.raises(ModelError, match="temporal kernel of 1"):
        grids_of(PAPER_TUBES[:3], (1, 224, 224))


def test_no_tubes_at_all() -> None:
    with pytest.raises(ModelError, match="empty"):
        TubeTokenizer((), 96)
