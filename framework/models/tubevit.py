"""TubeViT: one transformer for images and videos, reading sparse tubes (arXiv 2212.03229)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from framework.errors import ModelError
from framework.models.inputs import InputSpec
from framework.models.joint import JointModel, Size, encoder_blocks
from framework.models.layers import Groups, LayerNorm
from framework.models.noise import depth_scales, dropout, dropout_seeds
from framework.models.pooling import ClassToken, build_pool
from framework.models.tokenizer import TubeTokenizer
from framework.models.tubes import Grid, check_tubes, grids_of
from framework.recipe.schema import Pool, Position, Tube

__all__ = ["Noise", "Size", "TubeViT"]


@dataclass(frozen=True)
class Noise:
    """What is dropped in one pass; None: nothing."""

    depth: Tensor | None = None
    """`noise.depth_scales`, layers first."""
    embedding: Tensor | None = None
    """Seeds of dropout in the embedding: int32 (total_tokens,)."""
    elements: Tensor | None = None
    """Seeds of dropout in the branches: int32 (layers, 2, total_tokens)."""

    def of(self, layer: int) -> tuple[Tensor | None, Tensor | None]:
        """What block number `layer` is told of it."""
        depth = None if self.depth is None else self.depth[layer]
        return depth, None if self.elements is None else self.elements[layer]


class TubeViT(JointModel):
    """Tubes, a pre-norm ViT encoder, attention pooling, and one classifier per source.

    Images and videos go through in one pass: the tokens of all groups form one matrix (see `layers`).
    """

    positions = ("tokenizer.positions.", "pool.query")

    def __init__(
        self,
        size: Size,
        tubes: Sequence[Tube],
        inputs: Mapping[str, InputSpec],
        *,
        interpolated: Sequence[int] = (),
        position: Position = "fixed",
        pool: Pool = "attention",
        dropout: float = 0.0,
        stochastic_depth: float = 0.0,
    ) -> None:
        """Build with random weights.

        Args:
            size: the numbers of the encoder.
            tubes: shapes of the tubes.
            inputs: what each source will feed.
            interpolated: indices of the tubes whose kernels are resized from one shared kernel.
            position: what tells tokens where they come from.
            pool: how tokens become one vector.
            dropout: share of elements that are dropped from the embedding and from all branches.
            stochastic_depth: share of branches that are dropped at the last layer; linearly fewer before.

        Errors:
            ModelError: a tube does not fit the width or a source; the message names it.
        """
        super().__init__(size, inputs, stochastic_depth=stochastic_depth)
        self.dropout = dropout
        clips = {name: (spec.frames, spec.size, spec.size) for name, spec in self.inputs.items()}
        check_tubes(tubes, size.width)
        for name, clip in clips.items():
            _count_tokens(name, clip, partial(grids_of, tubes))
        self.tokenizer = TubeTokenizer(
            tubes, size.width, clips=list(clips.values()), position=position, interpolated=interpolated
        )
        self.class_token = ClassToken(size.width) if pool == "class_token" else None
        self.blocks = encoder_blocks(size, dropout=dropout)
        self.norm = LayerNorm(size.width)
        self.pool = build_pool(pool, size.width, size.heads, size.mlp_width)
        self.add_heads(size.width)

    def forward(
        self, pixels: Mapping[str, Tensor], seeds: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Logits of all samples of a micro-batch.

        Args:
            pixels: per source (batch, 3, frames, height, width); uint8, or floats that are already
                normalised. One frame is an image. Any subset of the sources, each with a batch of its own.
            seeds: per source int64 (batch,), for stochastic depth and dropout. None, or a model in evaluation
                mode: both are off.

        Returns:
            Per source float32 (batch, classes).

        Errors:
            ModelError: an unknown source, a wrong shape, or a clip that a tube does not fit.
        """
        names = self._sources(pixels)
        groups = tuple(self._group(name, pixels[name]) for name in names)
        tokens = self.tokenizer([pixels[name] for name in names])
        if self.class_token is not None:
            tokens, groups = self.class_token(tokens, groups)
        noise = self._noise(tokens, groups, names, seeds)
        if noise.embedding is not None:
            tokens = dropout(tokens, noise.embedding, self.dropout)
        return self._classify(self._encode(tokens, groups, noise, range(len(self.blocks))), groups, names)

    def _encode(self, tokens: Tensor, groups: Groups, noise: Noise, layers: Iterable[int]) -> Tensor:
        """Run some of the blocks."""
        for layer in layers:
            tokens = self._run(self.blocks[layer], tokens, groups, *noise.of(layer))
        return tokens

    def _noise(
        self, tokens: Tensor, groups: Groups, names: Sequence[str], seeds: Mapping[str, Tensor] | None
    ) -> Noise:
        """What is dropped in this pass; nothing without seeds, and in evaluation mode."""
        if not self.training or seeds is None:
            return Noise()
        joined, layers = torch.cat([seeds[name] for name in names]), len(self.blocks)
        depth = embedding = elements = None
        if self.stochastic_depth > 0:
            depth = depth_scales(joined, groups, layers, self.stochastic_depth, tokens.dtype)
        if self.dropout > 0:
            all_seeds = dropout_seeds(joined, groups, layers)
            embedding, elements = all_seeds[0], all_seeds[1:].view(layers, 2, -1)
        return Noise(depth, embedding, elements)

    def _classify(self, tokens: Tensor, groups: Groups, names: Sequence[str]) -> dict[str, Tensor]:
        """From the tokens that leave the encoder to the logits of each source."""
        pooled = self.pool(self.norm(tokens), groups)
        return self.classify(pooled, [samples for samples, _ in groups], names)

    def _group(self, name: str, pixels: Tensor) -> tuple[int, int]:
        self._check_shape(name, pixels)
        samples, _, frames, height, width = pixels.shape
        return samples, _count_tokens(name, (frames, height, width), self.tokenizer.grids)


def _count_tokens(
    name: str, clip: tuple[int, int, int], find_grids: Callable[[tuple[int, int, int]], Sequence[Grid]]
) -> int:
    """Count the tokens of a clip; the error of a tube that does not fit also names the source."""
    try:
        return sum(grid.tokens for grid in find_grids(clip))
    except ModelError as error:
        raise ModelError(f"source {name}: {error}") from error
