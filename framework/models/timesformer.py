"""TimeSformer: divided, joint and space-only attention (arXiv 2102.05095).

Patches of single frames, learned vectors for places and for times, and a class token, which is classified.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from framework.models.inputs import InputSpec
from framework.models.joint import Size, encoder_blocks
from framework.models.layers import LayerNorm, join, matrix
from framework.models.pooling import FirstToken
from framework.models.video_blocks import DividedBlock
from framework.models.video_model import Places, Reading, Times, VideoClassifier, place_frames
from framework.models.work import Work
from framework.recipe.schema import Gelu, Tube

__all__ = ["Scheme", "TimeSformer"]

Scheme = Literal["divided", "joint", "space"]


class TimeSformer(VideoClassifier):
    """Attention over time and space: one after the other, together, or over space alone.

    With `space` the tokens of all frames are averaged place by place before the last norm.
    """

    positions = ("places.", "times.")

    def __init__(
        self,
        size: Size,
        tube: Tube,
        inputs: Mapping[str, InputSpec],
        *,
        scheme: Scheme,
        gelu: Gelu = "exact",
        stochastic_depth: float = 0.0,
    ) -> None:
        """Build with random weights; `tube` is a patch of one frame.

        Errors:
            ModelError: a source that is smaller than a patch.
        """
        super().__init__(size, tube, inputs, stochastic_depth=stochastic_depth)
        self.scheme = scheme
        frames, height, width = self.largest
        self.places = Places((1, height, width), size.width, class_token=True)
        self.times = Times(frames, size.width) if scheme != "space" else None
        numbers = (size.width, size.heads, size.mlp_width, gelu)
        self.blocks = (
            nn.ModuleList(DividedBlock(*numbers) for _ in range(size.depth))
            if scheme == "divided"
            else encoder_blocks(size, gelu=gelu)
        )
        self.norm = LayerNorm(size.width)
        self.pool = FirstToken()
        self.add_heads(size.width)

    def features(self, reading: Reading) -> Tensor:
        """What is classified: (total_samples, width)."""
        return {"divided": self._divided, "joint": self._joint, "space": self._space}[self.scheme](reading)

    def _apart(self, reading: Reading) -> tuple[list[Tensor], list[Tensor]]:
        """Class tokens (samples, 1, width), and patches with their times (samples, tokens, width)."""
        assert self.times is not None
        framed = place_frames(self.places, reading)
        first = [part[:, 0, :1] for part in framed]
        return first, [self.times(part[:, :, 1:]).flatten(1, 2) for part in framed]

    def _divided(self, reading: Reading) -> Tensor:
        (first, of_first), (tokens, of_tokens) = map(matrix, self._apart(reading))
        layers, branches = self.size.depth, DividedBlock.branches
        noise = [self.drop(reading, groups, layers, branches=branches) for groups in (of_first, of_tokens)]
        for block, *depth in zip(self.blocks, *noise, strict=True):
            first, tokens = self._run(
                block, first, tokens, reading.grids, None if depth[0] is None else tuple(depth)
            )
        return self.norm(first)

    def _joint(self, reading: Reading) -> Tensor:
        tokens, groups = matrix([torch.cat(pair, dim=1) for pair in zip(*self._apart(reading), strict=True)])
        depths = self.drop(reading, groups, self.size.depth)
        return self.pool(self.norm(self._run_all(self.blocks, tokens, groups, depths)), groups)

    def _space(self, reading: Reading) -> Tensor:
        tokens, groups = self.places(*reading.frames)
        depths = self.drop(reading, reading.whole(groups), self.size.depth)
        first = self.pool(self._run_all(self.blocks, tokens, groups, depths), groups)
        parts = first.split([samples * times for samples, times, _ in reading.grids])
        pooled = [
            part.view(samples, times, -1).mean(dim=1)
            for part, (samples, times, _) in zip(parts, reading.grids, strict=True)
        ]
        return self.norm(join(pooled))

    def sequence_length(self, spec: InputSpec) -> int:
        """Tokens of a sample of a source, with the class token, of which `space` has one a frame."""
        times, height, width = self.shape_of(spec)
        return times * (height * width + 1) if self.scheme == "space" else times * height * width + 1

    def work(self, spec: InputSpec) -> Work:
        """What one forward pass of one sample of a source takes."""
        times, height, width = self.shape_of(spec)
        places, size = height * width, self.size
        tokens, framed = times * places, times * (places + 1)
        work = self.embedding_work(spec)
        if self.scheme == "joint":
            work.encoder(size, tokens + 1, (tokens + 1) ** 2)
        elif self.scheme == "space":
            work.encoder(size, framed, times * (places + 1) ** 2)
        else:
            for _ in range(size.depth):
                work.attention(size.width, size.heads, tokens, places * times**2)
                work.linear(tokens, size.width, size.width)
                work.attention(size.width, size.heads, framed, times * (places + 1) ** 2)
                work.mlp(size.width, size.mlp_width, tokens + 1)
        return work.linear(1, size.width, spec.classes)
