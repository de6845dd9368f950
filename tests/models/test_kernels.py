"""Kernels: one shared kernel resized as torch does it, at one scale; Space-to-Depth; tube sets."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange

from framework.models import InputSpec, build_model
from framework.models.kernels import SHARED_KERNEL, SharedKernel, resize_matrix
from framework.models.tokenizer import TubeTokenizer
from framework.models.tubes import grids_of, sub_stride
from framework.recipe.schema import Model, Tube, TubeSet
from framework.recipe.tube_sets import ABLATION_KERNELS, PAPER_TUBES, TUBE_SETS


@pytest.mark.parametrize("kernel", [*ABLATION_KERNELS, (1, 16, 16), (3, 5, 7)])
def test_a_resized_kernel_is_trilinear_up_to_one_factor(kernel: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    shared = SharedKernel(12)
    found = shared(Tube(kernel=kernel, stride=kernel))
    expected = F.interpolate(shared.weight, size=kernel, mode="trilinear", align_corners=False)
    factor = (found * expected).sum() / expected.square().sum()
    torch.testing.assert_close(found, factor * expected, rtol=1e-4, atol=1e-4)


def test_the_shape_of_the_kernel_itself_is_left_alone_but_copied() -> None:
    """A copy, because under ZeRO-3 the parameter is not there any more when the product is computed."""
    shared = SharedKernel(12)
    found = shared(Tube(kernel=SHARED_KERNEL, stride=SHARED_KERNEL))
    assert torch.equal(found, shared.weight)
    assert found.data_ptr() != shared.weight.data_ptr()


def test_rows_of_a_resizing_sum_to_one() -> None:
    for wanted in (1, 4, 8, 12, 32):
        torch.testing.assert_close(resize_matrix(8, wanted).sum(1), torch.ones(wanted, dtype=torch.float64))


@pytest.mark.parametrize("tube_set", ["paper", "eight"])
def test_tokens_of_interpolated_tubes_start_at_one_scale(tube_set: str) -> None:
    torch.manual_seed(0)
    tubes, clip = TUBE_SETS[tube_set], (32, 224, 224)
    everything = tuple(range(len(tubes)))
    tokenizer = TubeTokenizer(tubes, 192, position="none", interpolated=everything)
    parts = tokenizer([torch.randn(1, 3, *clip)]).split([grid.tokens for grid in grids_of(tubes, clip)])
    scales = torch.stack([part.std() for part in parts])
    assert (scales / scales.mean() - 1).abs().max() < 0.06


def build(**changes: object) -> torch.nn.Module:
    options = {"name": "tubevit_ti", "width": 48, "depth": 1, "kernels": "interpolated", **changes}
    return build_model(Model.model_validate(options), {"video": InputSpec("video", 32, 224, 4)})


def test_the_patch_kernel_stays_its_own_unless_asked() -> None:
    own, shared = build().state_dict(), build(interpolate_2d=True).state_dict()
    assert tuple(own["tokenizer.tubes.3.weight"].shape) == (48, 3, 1, 16, 16)
    assert [name for name in own if name.startswith("tokenizer") and name.endswith("weight")] == [
        "tokenizer.kernel.weight",
        "tokenizer.tubes.3.weight",
    ]
    assert [name for name in shared if name.startswith("tokenizer") and name.endswith("weight")] == [
        "tokenizer.kernel.weight"
    ]


def test_images_leave_the_shared_kernel_alone() -> None:
    torch.manual_seed(0)
    model = build_model(
        Model.model_validate({"name": "tubevit_ti", "width": 48, "depth": 1, "kernels": "interpolated"}),
        {"photos": InputSpec("image", 1, 224, 4)},
    )
    model({"photos": torch.zeros(1, 3, 1, 224, 224)})["photos"].sum().backward()
    assert model.tokenizer.kernel.weight.grad is None


@pytest.mark.parametrize("interpolated", [(), (0,)])
@pytest.mark.parametrize(
    "factors", [(2, 1, 1), (4, 1, 1), (1, 2, 2), (1, 4, 1), (1, 1, 4), (2, 2, 1), (2, 2, 2), (4, 2, 2)]
)
def test_space_to_depth_is_a_convolution_whose_neighbours_are_joined(
    factors: tuple[int, int, int], interpolated: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    tube = Tube(kernel=(4, 4, 4), stride=(16, 16, 16), offset=(3, 1, 0), space_to_depth=factors)
    clip = torch.randn(2, 3, 35, 33, 48)
    tokenizer = TubeTokenizer((tube,), 48, position="none", interpolated=interpolated)
    weight = tokenizer.kernel(tube) if tokenizer.kernel is not None else tokenizer.tubes[0].weight
    grid = F.conv3d(clip[:, :, 3:, 1:], weight, stride=sub_stride(tube))
    f_t, f_h, f_w = factors
    expected = rearrange(grid, "b c (t ft) (h fh) (w fw) -> (b t h w) (ft fh fw c)", ft=f_t, fh=f_h, fw=f_w)
    assert len(expected) == 2 * 2 * 2 * 3
    torch.testing.assert_close(tokenizer([clip]), expected, atol=1e-4, rtol=1e-4)


def test_every_tube_set_can_be_named() -> None:
    assert set(TUBE_SETS) == set(get_args(TubeSet))


@pytest.mark.parametrize(
    ("name", "frames", "tokens"),
    [
        ("one", 32, 392),  # §3.2
        ("two", 32, 392 + 392),
        ("paper", 32, 539),
        ("paper", 64, 1176),
        ("paper_dense", 32, 735),
        ("eight", 32, 7 * 49 + 392),
        ("charades", 128, 8 * 49 + 16 * 49 + 8 * 36 + 4 * 196),
    ],
)
def test_tokens_of_tube_sets(name: str, frames: int, tokens: int) -> None:
    clip = (frames, 224, 224)
    assert sum(grid.tokens for grid in grids_of(TUBE_SETS[name], clip)) == tokens
    assert [grid.shape for grid in grids_of(TUBE_SETS[name], (1, 224, 224))] == [(1, 14, 14)]


def test_the_paper_s_tubes_are_the_default() -> None:
    model = build(kernels="independent")
    assert model.tokenizer.shapes == PAPER_TUBES
    assert build(kernels="independent", tube_set="two").tokenizer.shapes == TUBE_SETS["two"]
