"""TimeSformer: divided, joint and space-only attention (arXiv 2102.05095).

Patches of single frames, learned vectors for places and for times, and a class token, which is classified.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from framework.models.inputs import InputSpec
from framework.models.joint import Size
from framework.models.layers import Block, Groups, LayerNorm, join
from framework.models.pooling import FirstToken
from framework.models.video_blocks import DividedBlock
from framework.models.video_model import Places, Reading, Times, VideoModel
from framework.models.work import Work
from framework.recipe.schema import Gelu, Tube

__all__ = ["Scheme", "TimeSformer"]

Scheme = Literal["divided", "joint", "space"]


class TimeSformer(VideoModel):
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
        numbers = (size.width, size.heads, size.mlp_width)
        self.blocks = nn.ModuleList(
            DividedBlock(*numbers, gelu) if scheme == "divided" else Block(*numbers, gelu=gelu)
            for _ in range(size.depth)
        )
        self.norm = LayerNorm(size.width)
        self.pool = FirstToken()
        self.add_heads(size.width)

    def forward(
        self, pixels: Mapping[str, Tensor], seeds: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Logits of all samples of a micro-batch; see `VideoModel.read` for the arguments.

        Returns:
            Per source float32 (batch, classes).

        Errors:
            ModelError: an unknown source, a wrong shape, or a clip that is larger than the learned places.
        """
        reading = self.read(pixels, seeds)
        encode = {"divided": self._divided, "joint": self._joint, "space": self._space}[self.scheme]
        return self.classify(encode(reading), reading.samples, reading.names)

    def _framed(self, reading: Reading) -> list[Tensor]:
        """Class tokens and patches of every frame, with their places: (samples, times, places + 1, width)."""
        parts = [
            part.reshape(samples * times, places, -1)
            for part, (samples, times, places) in zip(reading.parts, reading.grids, strict=True)
        ]
        tokens, groups = self.places(parts, [(1, height, width) for _, height, width in reading.shapes])
        return [
            part.view(samples, times, places + 1, -1)
            for part, (samples, times, places) in zip(
                tokens.split([frames * length for frames, length in groups]), reading.grids, strict=True
            )
        ]

    def _apart(self, reading: Reading) -> tuple[list[Tensor], list[Tensor]]:
        """Class tokens (samples, 1, width), and patches with their times (samples, tokens, width)."""
        assert self.times is not None
        framed = self._framed(reading)
        first = [part[:, 0, :1] for part in framed]
        return first, [self.times(part[:, :, 1:]).flatten(1, 2) for part in framed]

    def _divided(self, reading: Reading) -> Tensor:
        first_parts, parts = self._apart(reading)
        first, tokens = (
            join([part.flatten(0, 1) for part in first_parts]),
            join([p.flatten(0, 1) for p in parts]),
        )
        ones: Groups = tuple((samples, 1) for samples in reading.samples)
        branches, layers = DividedBlock.branches, len(self.blocks)
        of_first = self.drop(reading, ones, layers, branches=branches)
        of_tokens = self.drop(reading, reading.per_sample, layers, branches=branches)
        for block, *depth in zip(self.blocks, of_first, of_tokens, strict=True):
            noise = None if depth[0] is None else tuple(depth)
            first, tokens = self._run(block, first, tokens, reading.grids, noise)
        return self.norm(first)

    def _joint(self, reading: Reading) -> Tensor:
        whole = [torch.cat(pair, dim=1) for pair in zip(*self._apart(reading), strict=True)]
        groups: Groups = tuple((part.shape[0], part.shape[1]) for part in whole)
        tokens = self._plain(reading, join([part.flatten(0, 1) for part in whole]), groups, groups)
        return self.pool(self.norm(tokens), groups)

    def _space(self, reading: Reading) -> Tensor:
        framed = self._framed(reading)
        groups: Groups = tuple((part.shape[0] * part.shape[1], part.shape[2]) for part in framed)
        of_samples: Groups = tuple((part.shape[0], part.shape[1] * part.shape[2]) for part in framed)
        tokens = self._plain(reading, join([part.flatten(0, 2) for part in framed]), groups, of_samples)
        parts = tokens.split([rows * length for rows, length in groups])
        pooled = [
            part.view(samples, times, places + 1, -1)[:, :, 0].mean(dim=1)
            for part, (samples, times, places) in zip(parts, reading.grids, strict=True)
        ]
        return self.norm(join(pooled))

    def _plain(self, reading: Reading, tokens: Tensor, groups: Groups, of_samples: Groups) -> Tensor:
        for block, depth in zip(self.blocks, self.drop(reading, of_samples, len(self.blocks)), strict=True):
            tokens = self._run(block, tokens, groups, depth)
        return tokens

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
        for _ in range(size.depth):
            if self.scheme == "divided":
                work.attention(size.width, size.heads, tokens, places * times**2)
                work.linear(tokens, size.width, size.width)
                work.attention(size.width, size.heads, framed, times * (places + 1) ** 2)
                work.mlp(size.width, size.mlp_width, tokens + 1)
                continue
            rows = tokens + 1 if self.scheme == "joint" else framed
            pairs = rows**2 if self.scheme == "joint" else times * (places + 1) ** 2
            work.attention(size.width, size.heads, rows, pairs).mlp(size.width, size.mlp_width, rows)
        return work.linear(1, size.width, spec.classes)
