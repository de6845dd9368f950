"""From the boxes of tubes to tokens: a kernel for each tube, or one for all, resized (TubeViT §3.4).

Boxes are multiplied by the kernel: the result of a convolution without padding, at a fraction of its time and
memory, and without the faults of bf16 convolutions in several releases of cuDNN. Weights keep a convolution's
shape, which is what they are to everybody else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from framework.models.layers import join
from framework.models.tubes import CHANNELS
from framework.recipe.schema import Tube

__all__ = ["SHARED_KERNEL", "ResizedProjection", "SharedKernel", "TubeProjection", "resize_matrix"]

# The position embedding has a fixed scale of 0.7 per channel. With Xavier's gain of about 1, the motion of a
# digit is still not learned after a hundred small steps, with 3 it is on the way; 6 is worse on images.
GAIN = 3.0
SHARED_KERNEL = (8, 8, 8)


class TubeProjection(nn.Module):
    """The kernel of one tube, as the weight (sub-width, 3, k_t, k_h, k_w) and bias of a convolution.

    Weights start with a deviation of `GAIN` over the square root of the kernel's volume: tokens of all tubes
    have the same scale, whatever their volume, and what a tube shows is not drowned by where it lies.
    """

    def __init__(self, tube: Tube, width: int) -> None:
        super().__init__()
        channels = width // math.prod(tube.space_to_depth)
        self.weight = nn.Parameter(torch.empty(channels, CHANNELS, *tube.kernel))
        self.bias = nn.Parameter(torch.zeros(channels))
        _initialise(self.weight)

    def forward(self, boxes: Sequence[Tensor]) -> Tensor:
        """Project what `tubes.cut` returned for each group: to (rows of all groups, sub-width)."""
        return _project(boxes, self.weight, self.bias)


class SharedKernel(nn.Module):
    """The one learned kernel of interpolated tubes: weight (width, 3, 8, 8, 8), resized trilinearly.

    Resizing averages weights or repeats them, which changes the scale of what comes out: tokens of a random
    8x8x8 kernel keep 0.29 of their deviation as 16x4x4. A resized kernel is therefore divided by the norms of
    the three resizing matrices, so that independent pixels make tokens of one scale in all tubes. The square
    root of the ratio of the volumes would leave 16x4x4 at 0.41.

    A tube with Space-to-Depth has width / factors channels, and takes the first so many of the kernel.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, CHANNELS, *SHARED_KERNEL))
        _initialise(self.weight)
        self._matrices: dict[tuple[object, ...], tuple[Tensor, ...]] = {}

    def forward(self, tube: Tube) -> Tensor:
        """The kernel of a tube: (width / Space-to-Depth factors, 3, *its shape).

        Always a tensor of its own: under ZeRO-3 the parameter is gone when this module has returned.
        """
        kernel = self.weight[: len(self.weight) // math.prod(tube.space_to_depth)]
        for matrix in self._resizing(tube.kernel):
            # the axis that is resized goes to the end, and after three times all are back in order
            kernel = torch.einsum("oczyx,kz->ocyxk", kernel, matrix)
        return kernel

    def _resizing(self, shape: tuple[int, int, int]) -> tuple[Tensor, ...]:
        key = (shape, self.weight.device, self.weight.dtype)
        if key not in self._matrices:
            with torch.inference_mode(False):
                found = [resize_matrix(*pair) for pair in zip(SHARED_KERNEL, shape, strict=True)]
                # of independent pixels, the variance grows with the square of the matrix' norm
                scaled = [matrix * (matrix.shape[1] ** 0.5 / matrix.norm()) for matrix in found]
                self._matrices[key] = tuple(matrix.to(*key[1:]) for matrix in scaled)
        return self._matrices[key]


class ResizedProjection(nn.Module):
    """What a tube with an interpolated kernel has of its own: the bias."""

    def __init__(self, tube: Tube, width: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(width // math.prod(tube.space_to_depth)))

    def forward(self, boxes: Sequence[Tensor], kernel: Tensor) -> Tensor:
        """Project what `tubes.cut` returned for each group: to (rows of all groups, sub-width)."""
        return _project(boxes, kernel, self.bias)


def resize_matrix(size: int, wanted: int) -> Tensor:
    """The linear map that resizes `size` values to `wanted` by linear interpolation between their centres.

    The same as `torch.nn.functional.interpolate` without aligned corners and without anti-aliasing, but its
    gradient is a matrix product too, and so deterministic on all devices.

    Returns:
        float64 (wanted, size); every row sums to 1.
    """
    places = (torch.arange(wanted, dtype=torch.float64, device="cpu") + 0.5) * (size / wanted) - 0.5
    places = places.clamp(0, size - 1)
    distances = (places.unsqueeze(1) - torch.arange(size, dtype=torch.float64, device="cpu")).abs()
    return (1 - distances).clamp(min=0)


def _initialise(weight: Tensor) -> None:
    deviation = GAIN / math.sqrt(math.prod(weight.shape[1:]))
    nn.init.trunc_normal_(weight, std=deviation, a=-2 * deviation, b=2 * deviation)


def _project(boxes: Sequence[Tensor], weight: Tensor, bias: Tensor) -> Tensor:
    prepared = join([_normalise(part, weight.dtype) for part in boxes])
    return F.linear(prepared, weight.flatten(1), bias)


def _normalise(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Bring bytes to [-1, 1]; values that are floats already are taken as they are.

    The halves that the subtraction leaves are exact in bf16, so only the product is rounded.
    """
    if values.dtype != torch.uint8:
        return values.to(dtype)
    return values.to(dtype).sub_(127.5).mul_(2 / 255)
