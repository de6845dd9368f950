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
        return self.place(self.tokens(clips), clips)

    def tokens(self, clips: Sequence[Tensor]) -> list[Tensor]:
        """The tokens of each group without their positions: (batch, tokens, width)."""
        grids = [{grid.tube: grid.shape for grid in self.grids(_shape(clip))} for clip in clips]
        parts: list[list[Tensor]] = [[] for _ in clips]
        for number in range(len(self.shapes)):
            readers = [group for group, grid in enumerate(grids) if number in grid]
            if not readers:
                continue
            read = self.read_tube(
                number, [clips[group] for group in readers], [grids[group][number] for group in readers]
            )
            for group, tokens in zip(readers, read, strict=True):
                parts[group].append(tokens)
        return [part[0] if len(part) == 1 else torch.cat(part, dim=1) for part in parts]

    def read_tube(
        self, number: int, clips: Sequence[Tensor], shapes: Sequence[tuple[int, int, int]]
    ) -> list[Tensor]:
        """The tokens that one tube makes of clips, whose grids have these shapes: (batch, tokens, width)."""
        boxes = [cut(clip, self.shapes[number], shape) for clip, shape in zip(clips, shapes, strict=True)]
        projected = self._project(number, boxes).split([box.shape[0] for box in boxes])
        # sub-tubes of a token are neighbouring rows, so this view is Space-to-Depth
        return [
            tokens.reshape(clip.shape[0], -1, self.width)
            for clip, tokens in zip(clips, projected, strict=True)
        ]

    def place(self, tokens: Sequence[Tensor], clips: Sequence[Tensor]) -> Tensor:
        """Add positions to what `tokens` made of the clips, and make it one matrix (total_tokens, width)."""
        return join([self._place(part, _shape(clip)) for part, clip in zip(tokens, clips, strict=True)])

    def _project(self, number: int, boxes: Sequence[Tensor]) -> Tensor:
        projection = self.tubes[number]
        if isinstance(projection, ResizedProjection):
            assert self.kernel is not None
            return projection(boxes, self.kernel(self.shapes[number]))
        return projection(boxes)

    def _place(self, tokens: Tensor, clip: tuple[int, int, int]) -> Tensor:
        if self.positions is not None:
            tokens = tokens + self.positions(self.grids(clip), tokens.device, tokens.dtype)
        return tokens.flatten(0, 1)


def _shape(clip: Tensor) -> tuple[int, int, int]:
    return clip.shape[2], clip.shape[3], clip.shape[4]
