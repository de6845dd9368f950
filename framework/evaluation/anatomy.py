"""Pictures of a trained model itself: what its kernels look for, what its tubes read, what positions tell.

All are contact sheets in `RUN/pictures/`: `kernels-N-….png` for tube N, `coverage-SOURCE.png` and
`positions-SOURCE.png` for every source.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from framework.models.inputs import InputSpec
from framework.models.kernels import ResizedProjection
from framework.models.registry import build_tokenizer, inputs_of
from framework.models.tokenizer import TubeTokenizer
from framework.models.tubes import Grid, sub_stride
from framework.recipe.schema import Recipe, Tube
from framework.tracking.pictures import Tile, contact_sheet

__all__ = ["PREFIX", "coverage_tiles", "draw_anatomy", "kernel_tiles", "position_tiles"]

KERNELS = 16
FRAMES = 8
PREFIX = "tokenizer."
"""Of the names of the tensors that are drawn."""
COOL, WARM = np.array([247, 247, 250]), np.array([33, 84, 166])


@torch.no_grad()
def draw_anatomy(
    recipe: Recipe, tensors: Iterable[tuple[str, Tensor]], step: int, folder: Path
) -> list[Path]:
    """Draw the tokenizer of a model; returns the PNG files.

    Args:
        recipe: what the model was trained by.
        tensors: those whose names begin with `PREFIX`.
        step: after which they are.
        folder: where the pictures go.

    Errors:
        RecipeError: a model with several tokenizers.
        OSError: a picture cannot be written.
    """
    inputs = inputs_of(recipe)
    tokenizer = build_tokenizer(recipe.model, inputs)
    tokenizer.load_state_dict({name.removeprefix(PREFIX): tensor for name, tensor in tensors})
    drawn = []
    for number, tube in enumerate(tokenizer.shapes):
        path = folder / f"kernels-{number + 1}-{_times(tube.kernel)}.png"
        title = f"tube {number + 1}, {_times(tube.kernel)}: its strongest kernels after step {step}"
        drawn.append(contact_sheet(kernel_tiles(tokenizer, number), path, title, frame_pixels=64))
    for name, spec in inputs.items():
        clip = _times((spec.frames, spec.size, spec.size))
        title = f"{name}: what each tube reads of {clip}"
        drawn.append(contact_sheet(coverage_tiles(tokenizer, spec), folder / f"coverage-{name}.png", title))
        if tokenizer.positions is not None:
            title = f"{name}: how alike a token's position is to that of the token in the middle"
            drawn.append(
                contact_sheet(position_tiles(tokenizer, spec), folder / f"positions-{name}.png", title)
            )
    return drawn


def kernel_tiles(tokenizer: TubeTokenizer, number: int) -> list[Tile]:
    """The kernels of a tube with the largest norms, frame by frame; grey is zero, each on its own scale."""
    projection = tokenizer.tubes[number]
    if isinstance(projection, ResizedProjection):
        assert tokenizer.kernel is not None
        weight = tokenizer.kernel(tokenizer.shapes[number])
    else:
        weight = projection.weight  # (channels, 3, frames, height, width)
    assert isinstance(weight, Tensor)
    strongest = weight.flatten(1).norm(dim=1).argsort(descending=True)[:KERNELS].tolist()
    return [Tile(_colours(weight[index]), f"kernel {index}") for index in strongest]


def coverage_tiles(tokenizer: TubeTokenizer, spec: InputSpec) -> list[Tile]:
    """For each tube, and for all together, which pixels of a clip's frames it reads."""
    clip = (spec.frames, spec.size, spec.size)
    tiles, together = [], np.zeros(clip, np.uint8)
    grids = tokenizer.grids(clip)
    for grid in grids:
        tube = tokenizer.shapes[grid.tube]
        read = _read_pixels(tube, grid, clip)
        together += read
        tiles.append(_heat_tile(read, f"tube {grid.tube + 1}, {_times(tube.kernel)}: {read.mean():.1%}"))
    tiles.append(_heat_tile(together / len(grids), f"all {len(grids)}: {(together > 0).mean():.1%} read"))
    return tiles


def position_tiles(tokenizer: TubeTokenizer, spec: InputSpec) -> list[Tile]:
    """For each tube, the cosine of every token's position embedding with that of its middle token."""
    assert tokenizer.positions is not None
    grids = tokenizer.grids((spec.frames, spec.size, spec.size))
    embeddings = tokenizer.positions(grids, torch.device("cpu"), torch.float32)  # (tokens, width)
    tiles = []
    for grid, part in zip(grids, embeddings.split([grid.tokens for grid in grids]), strict=True):
        time, height, width = grid.shape
        middle = ((time // 2) * height + height // 2) * width + width // 2
        likeness = torch.cosine_similarity(part, part[middle : middle + 1], dim=1).view(grid.shape)
        label = f"tube {grid.tube + 1}: {_times(grid.shape)} tokens, cosine from {likeness.min():.2f} to 1"
        low = float(likeness.min())
        scaled = (likeness - low) / max(1.0 - low, 1e-6)
        tiles.append(_heat_tile(scaled.clamp(0, 1).numpy(), label))
    return tiles


def _read_pixels(tube: Tube, grid: Grid, clip: tuple[int, int, int]) -> NDArray[np.uint8]:
    """1 where a tube reads, (frames, height, width)."""
    axes = []
    for axis, step in enumerate(sub_stride(tube)):
        line = np.zeros(clip[axis], np.uint8)
        for place in range(grid.shape[axis] * tube.space_to_depth[axis]):
            start = tube.offset[axis] + place * step
            line[start : start + tube.kernel[axis]] = 1
        axes.append(line)
    return np.einsum("t,h,w->thw", *axes)


def _heat_tile(values: NDArray[np.floating] | NDArray[np.uint8], label: str) -> Tile:
    """Frames of numbers from 0 to 1 as shades; at most `FRAMES` of them, spread over the clip."""
    count = values.shape[0]
    chosen = np.linspace(0, count - 1, min(count, FRAMES)).round().astype(int)
    shades = COOL + values[chosen][..., None].astype(np.float64) * (WARM - COOL)
    return Tile(shades.round().astype(np.uint8), label)


def _colours(kernel: Tensor) -> NDArray[np.uint8]:
    """(3, frames, height, width) around zero to uint8 (frames, height, width, 3) around grey."""
    scaled = kernel / kernel.abs().max().clamp(min=1e-12)
    return ((scaled.permute(1, 2, 3, 0) + 1) * 127.5).round().to(torch.uint8).numpy()


def _times(numbers: Sequence[int]) -> str:
    return "x".join(map(str, numbers))
