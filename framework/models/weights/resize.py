"""Kernels and places for other patch sizes, other pixels and other grids."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from framework.errors import ModelError
from framework.models.image_start import resize_places
from framework.models.kernels import resize_matrix

__all__ = ["denormalise", "renormalise", "resize_kernel", "to_grid"]


def resize_kernel(kernel: Tensor, wanted: Sequence[int]) -> tuple[Tensor, str]:
    """A kernel (channels, 3, time, height, width) for patches of another size, and how it was changed.

    The new kernel is the one whose tokens of an enlarged patch are those of the old one on the patch itself:
    the pseudo-inverse of the enlargement (FlexiViT, arXiv 2212.08013, §3.4), axis by axis.

    Errors:
        ModelError: kernels of other channels.
    """
    if tuple(kernel.shape) == tuple(wanted):
        return kernel, ""
    if kernel.ndim != len(wanted) or tuple(kernel.shape[:2]) != tuple(wanted[:2]):
        raise ModelError(f"a kernel of the shape {list(kernel.shape)} does not become {list(wanted)}")
    result = kernel.double()
    for axis in range(2, kernel.ndim):
        size, length = kernel.shape[axis], wanted[axis]
        if size != length:
            inverse = torch.linalg.pinv(resize_matrix(size, length).t())  # (length, size)
            result = (result.transpose(axis, -1) @ inverse.t()).transpose(axis, -1)
    return result.to(kernel.dtype).contiguous(), "resized"


def to_grid(places: Tensor, wanted: Sequence[int]) -> tuple[Tensor, str]:
    """Places in a row, (tokens, channels), for a grid (time, height, width, channels).

    A row as long as the grid is that grid. Another one must be square, or a number of square pictures with
    the times of the grid, and is interpolated.

    Errors:
        ModelError: a row that is no grid.
    """
    tokens, channels = places.shape
    time, height, width = wanted[:3]
    if tokens == time * height * width:
        return places.view(time, height, width, channels), ""
    for times in dict.fromkeys((time, 1)):
        side = math.isqrt(tokens // times)
        if times * side**2 == tokens:
            return resize_places(places.view(times, side, side, channels), torch.Size(wanted))
    raise ModelError(f"{tokens} places are no square, so they do not become {time} x {height} x {width}")


def renormalise(
    kernel: Tensor, bias: Tensor, mean: Sequence[float], std: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Kernel and bias for pixels from -1 to 1, made of those for pixels (x - mean) / std, x from 0 to 1.

    Nothing is lost: x = (p + 1) / 2, so p's kernel is divided by 2 std, and what its mean adds goes into the
    bias. The same with 1 / (2 std) and the opposite shift leads back (see `denormalise`).
    """
    scale, shift = _affine(kernel, mean, std)
    added = (kernel.double() * shift).sum(dim=tuple(range(1, kernel.ndim)))
    return (kernel.double() * scale).to(kernel.dtype), (bias.double() + added).to(bias.dtype)


def denormalise(
    kernel: Tensor, bias: Tensor, mean: Sequence[float], std: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """The way back of `renormalise`."""
    scale, shift = _affine(kernel, mean, std)
    original = kernel.double() / scale
    added = (original * shift).sum(dim=tuple(range(1, kernel.ndim)))
    return original.to(kernel.dtype), (bias.double() - added).to(bias.dtype)


def _affine(kernel: Tensor, mean: Sequence[float], std: Sequence[float]) -> tuple[Tensor, Tensor]:
    """(x - mean) / std = p * scale + shift, with a place for each colour of a kernel."""
    shape = (1, 3, *(1 for _ in kernel.shape[2:]))
    means, stds = (torch.tensor(list(values), dtype=torch.float64).view(shape) for values in (mean, std))
    return 1 / (2 * stds), (0.5 - means) / stds
