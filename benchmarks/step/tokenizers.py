"""Three ways from pixels to tubes' tokens: strided views and a product, a gather and a product, conv3d."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from framework.models.kernels import TubeProjection
from framework.models.tokenizer import TubeTokenizer
from framework.models.tubes import cut, sub_stride

__all__ = ["WAYS", "weight_gradients"]

Way = Callable[[TubeTokenizer, Tensor], Callable[[], Tensor]]


def by_product(tokenizer: TubeTokenizer, clip: Tensor) -> Callable[[], Tensor]:
    """The framework's own."""
    return lambda: tokenizer.tokens([clip])[0]


def by_gather(tokenizer: TubeTokenizer, clip: Tensor) -> Callable[[], Tensor]:
    """The pixels of each tube by an index that is made once, then one product."""
    shape = (clip.shape[2], clip.shape[3], clip.shape[4])
    places = torch.arange(clip[0].numel(), device=clip.device).view(1, *clip.shape[1:])
    indices = [cut(places, tokenizer.shapes[grid.tube], grid.shape) for grid in tokenizer.grids(shape)]

    def tokens() -> Tensor:
        flat = clip.flatten(1)
        parts = []
        for grid, index in zip(tokenizer.grids(shape), indices, strict=True):
            projection = cast(TubeProjection, tokenizer.tubes[grid.tube])
            boxes = _normalise(flat[:, index], projection.weight)  # (batch, sub-tubes, volume)
            projected = F.linear(boxes, projection.weight.flatten(1), projection.bias)
            parts.append(projected.reshape(len(clip), -1, tokenizer.width))
        return torch.cat(parts, dim=1)

    return tokens


def by_convolution(tokenizer: TubeTokenizer, clip: Tensor) -> Callable[[], Tensor]:
    """What the weights look like: a conv3d over the whole clip, then Space-to-Depth."""
    shape = (clip.shape[2], clip.shape[3], clip.shape[4])

    def tokens() -> Tensor:
        parts = []
        for grid in tokenizer.grids(shape):
            tube = tokenizer.shapes[grid.tube]
            projection = cast(TubeProjection, tokenizer.tubes[grid.tube])
            starts = [slice(start, None) for start in tube.offset]
            values = _normalise(clip[:, :, starts[0], starts[1], starts[2]], projection.weight)
            made = F.conv3d(values, projection.weight, projection.bias, sub_stride(tube))
            parts.append(_space_to_depth(made, tube.space_to_depth, grid.shape))
        return torch.cat(parts, dim=1)

    return tokens


WAYS: dict[str, Way] = {
    "strided views and a product": by_product,
    "gather and a product": by_gather,
    "conv3d": by_convolution,
}


def weight_gradients(tokenizer: TubeTokenizer, tokens: Callable[[], Tensor]) -> list[Tensor]:
    """One forward and backward pass; pixels need no gradient."""
    weights = list(tokenizer.tubes.parameters())
    out = tokens()
    return list(torch.autograd.grad(out, weights, torch.ones_like(out)))


def _normalise(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like.dtype).sub_(127.5).mul_(2 / 255)


def _space_to_depth(made: Tensor, factors: Sequence[int], grid: Sequence[int]) -> Tensor:
    """(batch, sub-width, places) to (batch, tokens, width), sub-tubes of a token side by side."""
    made = made[:, :, : grid[0] * factors[0], : grid[1] * factors[1], : grid[2] * factors[2]]
    for axis in (2, 1, 0):
        made = made.unflatten(axis + 2, (grid[axis], factors[axis]))
    # (batch, channel, t, f_t, h, f_h, w, f_w)
    return made.permute(0, 2, 4, 6, 3, 5, 7, 1).flatten(4).flatten(1, 3)
