"""How one or several of our tensors correspond to one or several of another library's, in both directions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "Link",
    "biases_of_heads",
    "class_token",
    "fused",
    "fused_without_key",
    "heads_to_output",
    "image_kernel",
    "last_channels_kernel",
    "places",
    "places_without_class",
    "same",
    "times",
    "transposed",
    "video_kernel",
    "weights_of_heads",
]

Tensors = Sequence[Tensor]
Change = Callable[[Tensors], list[Tensor]]


@dataclass(frozen=True)
class Link:
    """Names on both sides, with `{n}` for the number of a block, and the way there and back.

    `to_ours` keeps what the other side's shape says: places, for example, come as a row of (tokens,
    channels), which `framework.models.weights.convert` brings to the grid of the model.
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    to_ours: Change
    to_theirs: Change
    kind: str = ""
    """What the converter has to know: `kernel`, `places` and `times` may need another size."""


def same(ours: str, theirs: str) -> Link:
    """The same tensor under another name."""
    return Link((ours,), (theirs,), list, list)


def transposed(ours: str, theirs: str) -> Link:
    """A matrix (in, out), where ours is (out, in)."""
    return Link((ours,), (theirs,), _each(Tensor.t), _each(Tensor.t))


def fused(ours: str, *theirs: str) -> Link:
    """Queries, keys and values in one tensor here, in three there."""
    return Link(
        (ours,), theirs, lambda parts: [torch.cat(list(parts))], lambda whole: list(whole[0].chunk(3))
    )


def fused_without_key(ours: str, query: str, value: str) -> Link:
    """Biases of queries and values; keys have none there.

    A bias of the keys adds the same number to all logits of a query, which softmax does not see, so nothing
    is lost on the way there.
    """

    def to_ours(parts: Tensors) -> list[Tensor]:
        return [torch.cat([parts[0], torch.zeros_like(parts[0]), parts[1]])]

    def to_theirs(whole: Tensors) -> list[Tensor]:
        first, _, last = whole[0].chunk(3)
        return [first, last]

    return Link((ours,), (query, value), to_ours, to_theirs)


def image_kernel(ours: str, theirs: str) -> Link:
    """A patch's kernel without an axis of time: (channels, 3, height, width)."""
    return Link((ours,), (theirs,), _each(lambda t: t.unsqueeze(2)), _each(lambda t: t.squeeze(2)), "kernel")


def video_kernel(ours: str, theirs: str) -> Link:
    """A tubelet's kernel, as ours: (channels, 3, time, height, width)."""
    return Link((ours,), (theirs,), list, list, "kernel")


def last_channels_kernel(ours: str, theirs: str) -> Link:
    """A patch's kernel as JAX has it: (height, width, 3, channels)."""
    return Link(
        (ours,),
        (theirs,),
        _each(lambda t: t.permute(3, 2, 0, 1).unsqueeze(2)),
        _each(lambda t: t.squeeze(2).permute(2, 3, 1, 0)),
        "kernel",
    )


def class_token(ours: str, theirs: str) -> Link:
    """A class token (1, 1, channels)."""
    return Link((ours,), (theirs,), _each(Tensor.flatten), _each(lambda t: t.view(1, 1, -1)))


def places(class_place: str, grid: str, theirs: str) -> Link:
    """Places (1, 1 + tokens, channels), that of the class token first."""

    def to_theirs(parts: Tensors) -> list[Tensor]:
        return [torch.cat([parts[0].unsqueeze(0), parts[1].flatten(0, 2)]).unsqueeze(0)]

    return Link(
        (class_place, grid), (theirs,), lambda whole: [whole[0][0, 0], whole[0][0, 1:]], to_theirs, "places"
    )


def places_without_class(grid: str, theirs: str) -> Link:
    """Places (1, tokens, channels) of a model without a class token."""
    return Link(
        (grid,),
        (theirs,),
        lambda whole: [whole[0][0]],
        lambda parts: [parts[0].flatten(0, 2).unsqueeze(0)],
        "places",
    )


def times(ours: str, theirs: str) -> Link:
    """Vectors of times (1, times, channels)."""
    return Link((ours,), (theirs,), _each(lambda t: t[0]), _each(lambda t: t.unsqueeze(0)), "times")


def weights_of_heads(ours: str, heads: int, *theirs: str) -> Link:
    """Projections (in, heads, channels of a head), as JAX has them, into our fused (3 x out, in)."""

    def to_ours(parts: Tensors) -> list[Tensor]:
        return [torch.cat([part.flatten(1).t() for part in parts])]

    def to_theirs(whole: Tensors) -> list[Tensor]:
        return [part.t().unflatten(1, (heads, -1)) for part in whole[0].chunk(3)]

    return Link((ours,), theirs, to_ours, to_theirs)


def biases_of_heads(ours: str, heads: int, *theirs: str) -> Link:
    """Their biases (heads, channels of a head)."""

    def to_theirs(whole: Tensors) -> list[Tensor]:
        return [part.unflatten(0, (heads, -1)) for part in whole[0].chunk(3)]

    return Link((ours,), theirs, lambda parts: [torch.cat([part.flatten() for part in parts])], to_theirs)


def heads_to_output(ours: str, heads: int, theirs: str) -> Link:
    """The output projection (heads, channels of a head, out)."""
    return Link(
        (ours,),
        (theirs,),
        _each(lambda t: t.flatten(0, 1).t()),
        _each(lambda t: t.t().unflatten(0, (heads, -1))),
    )


def _each(change: Callable[[Tensor], Tensor]) -> Change:
    return lambda tensors: [change(tensor) for tensor in tensors]
