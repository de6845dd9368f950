"""The tokenizer of TubeViT: all tubes, their kernels, and the positions of their tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from framework.models.kernels import ResizedProjection, SharedKernel, TubeProjection
from framework.models.layers import join
from framework.models.positions import FixedPositions, LearnedPositions
from framework.models.tubes import Grid, check_tubes, cut, grids_of
from framework.recipe.schema import Position, Tube

__all__ = ["TubeTokenizer"]


class TubeTokenizer(nn.Module):
    """All tubes: clips of several groups to one token matrix, position embedding included."""

    def __init__(
        self,
        tubes: Sequence[Tube],
        width: int,
        *,
        clips: Sequence[tuple[int, int, int]] = (),
        position: Position = "fixed",
        interpolated: Sequence[int] = (),
    ) -> None:
        """Build with random weights.

        Args:
            tubes: their shapes.
            width: channels of a token.
            clips: (frames, height, width) of what will be read; only learned positions need to know.
            position: what tells tokens where they come from.
            interpolated: indices of the tubes whose kernels are resized from one shared kernel.

        Errors:
            ModelError: a tube does not fit the width, or does not fit a clip.
        """
        super().__init__()
        check_tubes(tubes, width)
        self.shapes = tuple(tubes)
        self.width = width
        self.kernel = SharedKernel(width) if interpolated else None
        self.tubes = nn.ModuleList(
            ResizedProjection(tube, width) if number in interpolated else TubeProjection(tube, width)
            for number, tube in enumerate(tubes)
        )
        # Derived from the shape of a clip alone, so not part of the state dict.
        self._grids: dict[tuple[int, int, int], tuple[Grid, ...]] = {}
        self.positions = self._build_positions(position, clips)

    def _build_positions(self, position: Position, clips: Sequence[tuple[int, int, int]]) -> nn.Module | None:
        if position == "none":
            return None
        if position == "learned":
            return LearnedPositions(self.shapes, self.width, [self.grids(clip) for clip in clips])
        return FixedPositions(self.shapes, self.width, position)

    def grids(self, clip: tuple[int, int, int]) -> tuple[Grid, ...]:
        """`grids_of` for a clip of (frames, height, width), remembered."""
        if clip not in self._grids:
            self._grids[clip] = grids_of(self.shapes, clip)
        return self._grids[clip]

    def forward(self, clips: Sequence[Tensor]) -> Tensor:
        """Tokenise; clips (batch, 3, frames, height, width), one tensor a group, to (total_tokens, width).

        Each projection runs once for all groups that it reads, in the order of the tubes.
        """
        clip_shapes = [(clip.shape[2], clip.shape[3], clip.shape[4]) for clip in clips]
        grids = [{grid.tube: grid for grid in self.grids(shape)} for shape in clip_shapes]
        parts: list[list[Tensor]] = [[] for _ in clips]
        for number, tube in enumerate(self.shapes):
            readers = [group for group, grid in enumerate(grids) if number in grid]
            if not readers:
                continue
            boxes = [cut(clips[group], tube, grids[group][number].shape) for group in readers]
            projected = self._project(number, boxes).split([len(box) for box in boxes])
            for group, tokens in zip(readers, projected, strict=True):
                # sub-tubes of a token are neighbouring rows, so this view is Space-to-Depth
                parts[group].append(tokens.reshape(len(clips[group]), -1, self.width))
        return join([self._finish(part, shape) for part, shape in zip(parts, clip_shapes, strict=True)])

    def _project(self, number: int, boxes: Sequence[Tensor]) -> Tensor:
        projection = self.tubes[number]
        if isinstance(projection, ResizedProjection):
            assert self.kernel is not None
            return projection(boxes, self.kernel(self.shapes[number]))
        return projection(boxes)

    def _finish(self, parts: list[Tensor], clip: tuple[int, int, int]) -> Tensor:
        tokens = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        if self.positions is not None:
            tokens = tokens + self.positions(self.grids(clip), tokens.device, tokens.dtype)
        return tokens.flatten(0, 1)
