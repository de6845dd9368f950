"""Where a token comes from: fixed sines and cosines, or tables that are learned."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from framework.errors import ModelError
from framework.models.tubes import AXES, Grid, centres, grid_indices
from framework.recipe.schema import Position, Tube
from framework.recipe.tube_sets import name_tube

__all__ = ["TEMPERATURE", "FixedPositions", "LearnedPositions", "sincos"]

TEMPERATURE = 10_000.0


def sincos(points: Tensor, width: int, *, printed: bool = False) -> Tensor:
    """Embed points of (time, height, width) in `width` channels (TubeViT §3.3, equations 3 to 7).

    With n = width // 6 frequencies w_j = 10000 ** (-j / n), channels 6j to 6j + 5 are
    sin(t w_j), cos(t w_j), sin(x w_j), cos(x w_j), sin(y w_j), cos(y w_j), where t counts frames and x, y run
    over the rows and columns of pixels. Channels that 6 does not divide stay zero: 4 of 1024, 2 of 1280.

    The paper prints the exponent as j, without dividing by n. Then w_1 is already 1e-4 and all but a few
    channels are the same for all tokens, so the exponent is normalised here, as in the authors' other code.

    Args:
        points: (points, 3), such as centres in frames and pixels.
        width: channels of a token.
        printed: take the exponent as it is printed.

    Returns:
        float32 (points, width).
    """
    frequencies = width // 6
    exponents = torch.arange(frequencies, dtype=torch.float64, device=points.device)
    if not printed:
        exponents = exponents / max(frequencies, 1)
    angles = points.to(torch.float64).unsqueeze(1) * (TEMPERATURE**-exponents).unsqueeze(-1)
    embedding = torch.zeros(len(points), width, dtype=torch.float32, device=points.device)
    # (points, frequencies, axes, 2) in memory order is the interleaving [t, x, y] of the paper
    waves = torch.stack((angles.sin(), angles.cos()), dim=-1)
    embedding[:, : 6 * frequencies] = waves.flatten(1).to(torch.float32)
    return embedding


class FixedPositions(nn.Module):
    """Sines and cosines of where tokens lie; remembered per clip, device and type, never in the state dict.

    `fixed` and `printed` embed the centre of the tube in frames and pixels. `fixed_no_stride`, for the row
    "fixed cosine without stride" of Table 7a, embeds the index of the token on the grid of its tube: strides,
    offsets and kernels are left out, so tokens of different tubes with one index share an embedding wherever
    they lie. The paper does not say more of that row than its name.
    """

    def __init__(self, tubes: Sequence[Tube], width: int, position: Position) -> None:
        super().__init__()
        self.shapes = tuple(tubes)
        self.width = width
        self.position = position
        self._embeddings: dict[tuple[object, ...], Tensor] = {}

    def forward(self, grids: tuple[Grid, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
        """Embed all tokens of the grids of a clip: (tokens, width)."""
        key = (grids, device, dtype)
        if key not in self._embeddings:
            with torch.inference_mode(False):  # training must be able to use what evaluation remembered
                points = torch.cat([self._points(grid) for grid in grids])
                embedding = sincos(points, self.width, printed=self.position == "printed")
                self._embeddings[key] = embedding.to(device, dtype)
        return self._embeddings[key]

    def _points(self, grid: Grid) -> Tensor:
        if self.position == "fixed_no_stride":
            return grid_indices(grid.shape)
        return centres(self.shapes[grid.tube], grid.shape)


class LearnedPositions(nn.Module):
    """A learned vector for every place on the grid of every tube.

    A table is as large as the largest grid of its tube among the sources; shorter or smaller clips, images
    too, take the corner of it that begins with them, which is the same place in frames and pixels.
    """

    def __init__(self, tubes: Sequence[Tube], width: int, grids: Sequence[Sequence[Grid]]) -> None:
        super().__init__()
        self.shapes = tuple(tubes)
        self.sizes: dict[int, tuple[int, int, int]] = {}
        for grid in (grid for clip in grids for grid in clip):
            known = self.sizes.get(grid.tube, (0, 0, 0))
            time, height, wide = (max(pair) for pair in zip(known, grid.shape, strict=True))
            self.sizes[grid.tube] = (time, height, wide)
        self.tables = nn.ModuleDict(
            {str(number): _Table(size, width) for number, size in sorted(self.sizes.items())}
        )

    def forward(self, grids: tuple[Grid, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
        """The vectors of all tokens of the grids of a clip: (tokens, width).

        Errors:
            ModelError: a grid is larger than those of the sources that the model was built for.
        """
        return torch.cat([self._part(grid) for grid in grids]).to(device, dtype)

    def _part(self, grid: Grid) -> Tensor:
        room = self.sizes.get(grid.tube, (0, 0, 0))
        for axis, (wanted, there) in enumerate(zip(grid.shape, room, strict=True)):
            if wanted > there:
                raise ModelError(
                    f"{name_tube(self.shapes, grid.tube)} makes {wanted} tokens along the {AXES[axis]}, but "
                    f"{there} positions were learned there; feed clips like those of the recipe's sources, "
                    "or take `model.position: fixed`, which knows every place"
                )
        return self.tables[str(grid.tube)](grid.shape)


class _Table(nn.Module):
    """One table of positions: `weight` (time, height, width, channels)."""

    def __init__(self, size: tuple[int, int, int], width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(*size, width))
        nn.init.trunc_normal_(self.weight, std=0.02)

    def forward(self, shape: tuple[int, int, int]) -> Tensor:
        """The corner of the table that a grid of this shape takes: (tokens, channels)."""
        time, height, width = shape
        # a copy: under ZeRO-3 the parameter is gone when this module has returned
        return self.weight[:time, :height, :width].flatten(0, 2).clone()
