"""Sparse video tubes: which boxes of a clip are cut out, and where they lie (TubeViT §3).

The boxes of a tube are a strided view of the clip, copied once; `kernels` projects them and `tokenizer` puts
both together.

Space-to-Depth (§3.4) with factors f: the tube has sub-tubes of width / (f_t f_h f_w) channels at strides
divided by f; neighbours are concatenated to one token, time first, then height, then width, then channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from framework.errors import ModelError
from framework.recipe.schema import Tube
from framework.recipe.tube_sets import name_tube, tubes_that_read

__all__ = [
    "AXES",
    "CHANNELS",
    "Grid",
    "centres",
    "check_tubes",
    "cut",
    "grid_indices",
    "grids_of",
    "sub_stride",
]

CHANNELS = 3
AXES = ("frames", "pixels of height", "pixels of width")


@dataclass(frozen=True)
class Grid:
    """The tokens that the tube with index `tube` makes of a clip: `shape` is (time, height, width)."""

    tube: int
    shape: tuple[int, int, int]

    @property
    def tokens(self) -> int:
        """How many tokens there are."""
        return math.prod(self.shape)


def grids_of(tubes: Sequence[Tube], clip: tuple[int, int, int]) -> tuple[Grid, ...]:
    """Which tubes read a clip of (frames, height, width), and the grids of their tokens.

    A clip of one frame is an image: only the first tube with a temporal kernel of 1 reads it.

    Errors:
        ModelError: names the tube and the rule that it breaks.
    """
    used = tubes_that_read(tubes, clip[0])
    if not used:
        raise ModelError(
            "none of the tubes has a temporal kernel of 1, so nothing can read an image; "
            "add a tube such as {kernel: [1, 16, 16], stride: [32, 16, 16]} to `model.tubes`"
        )
    return tuple(Grid(number, _grid(tubes, number, clip)) for number in used)


def _grid(tubes: Sequence[Tube], number: int, clip: tuple[int, int, int]) -> tuple[int, int, int]:
    tube = tubes[number]
    shape = []
    for axis, length in enumerate(clip):
        factor = tube.space_to_depth[axis]
        count = _sub_tubes(tube, axis, length)
        if count < 1:
            reason = (
                f"does not fit into a clip of {length} {AXES[axis]}: "
                f"its kernel and offset need at least {tube.kernel[axis] + tube.offset[axis]}"
            )
        elif count % factor:
            reason = (
                f"makes {count} sub-tubes of {length} {AXES[axis]}, "
                f"which its Space-to-Depth factor {factor} does not divide"
            )
        else:
            shape.append(count // factor)
            continue
        used = tubes if clip[0] > 1 else [tube]
        raise ModelError(f"{name_tube(tubes, number)} {reason}; {_advice(used, axis, length)}")
    return shape[0], shape[1], shape[2]


def _sub_tubes(tube: Tube, axis: int, length: int) -> int:
    """How many sub-tubes fit on an axis without padding; 0 or less: not even one."""
    return (length - tube.offset[axis] - tube.kernel[axis]) // sub_stride(tube)[axis] + 1


def _advice(tubes: Sequence[Tube], axis: int, length: int) -> str:
    """The nearest lengths of an axis that all tubes can read."""

    def fits(candidate: int) -> bool:
        counts = [(_sub_tubes(tube, axis, candidate), tube.space_to_depth[axis]) for tube in tubes]
        return all(count > 0 and count % factor == 0 for count, factor in counts)

    far = 2 * max(length, *(tube.kernel[axis] + tube.offset[axis] + 8 * tube.stride[axis] for tube in tubes))
    below = next((candidate for candidate in range(length - 1, 0, -1) if fits(candidate)), None)
    above = next((candidate for candidate in range(length + 1, far) if fits(candidate)), None)
    working = [str(candidate) for candidate in (below, above) if candidate is not None]
    if not working:
        return f"no number of {AXES[axis]} near that suits all tubes: change the tubes"
    return f"nearest number of {AXES[axis]} that suits all tubes: {' or '.join(working)}"


def sub_stride(tube: Tube) -> tuple[int, int, int]:
    """Distance of neighbouring sub-tubes in frames and pixels."""
    time, height, width = (
        step // factor for step, factor in zip(tube.stride, tube.space_to_depth, strict=True)
    )
    return time, height, width


def check_tubes(tubes: Sequence[Tube], width: int) -> None:
    """Refuse tubes whose Space-to-Depth cannot be made in tokens of `width` channels.

    Errors:
        ModelError: names the tube and the rule that it breaks.
    """
    if not tubes:
        raise ModelError(
            "`model.tubes` is empty; name at least one tube, or leave the key out for the paper's four"
        )
    for number, tube in enumerate(tubes):
        for axis, (step, factor) in enumerate(zip(tube.stride, tube.space_to_depth, strict=True)):
            if step % factor:
                raise ModelError(
                    f"{name_tube(tubes, number)} has a stride of {step} {AXES[axis]}, which its Space-to-"
                    f"Depth factor {factor} does not divide; take a stride that is a multiple of {factor}"
                )
        parts = math.prod(tube.space_to_depth)
        if width % parts:
            raise ModelError(
                f"{name_tube(tubes, number)} puts {parts} sub-tubes into one token, which does not divide "
                f"the model's width of {width}; take a multiple of {parts}, or another `space_to_depth`"
            )


def centres(tube: Tube, shape: tuple[int, int, int]) -> Tensor:
    """Centres of the tokens of a tube, those of the union of their sub-tubes.

    Returns:
        float64 (tokens, 3): frame, row, column, in the order of the tokens.
    """
    axes = []
    for axis, count in enumerate(shape):
        extent = (tube.space_to_depth[axis] - 1) * sub_stride(tube)[axis] + tube.kernel[axis]
        starts = torch.arange(count, dtype=torch.float64, device="cpu") * tube.stride[axis]
        axes.append(starts + tube.offset[axis] + extent / 2)
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 2)


def grid_indices(shape: tuple[int, int, int]) -> Tensor:
    """Where the tokens stand on the grid of their tube, whatever its stride, offset and kernel.

    Returns:
        float64 (tokens, 3): index in time, row, column, in the order of the tokens.
    """
    axes = [torch.arange(count, dtype=torch.float64, device="cpu") for count in shape]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 2)


def cut(pixels: Tensor, tube: Tube, shape: tuple[int, int, int]) -> Tensor:
    """Copy the boxes of a tube's sub-tubes out of clips.

    Args:
        pixels: (batch, 3, frames, height, width), any type.
        shape: the grid of tokens, from `grids_of`.

    Returns:
        (batch * tokens * sub-tubes of a token, 3 * volume of the kernel).
    """
    boxes = pixels
    for axis, (kernel, step) in enumerate(zip(tube.kernel, sub_stride(tube), strict=True)):
        boxes = boxes.narrow(axis + 2, tube.offset[axis], boxes.shape[axis + 2] - tube.offset[axis])
        boxes = boxes.unfold(axis + 2, kernel, step)  # grid stays in place, the kernel's axis goes to the end
    for axis, factor in reversed(list(enumerate(tube.space_to_depth))):
        boxes = boxes.unflatten(axis + 2, (shape[axis], factor))
    # (batch, channel, t, f_t, h, f_h, w, f_w, k_t, k_h, k_w): tokens first, then sub-tubes, then their pixels
    boxes = boxes.permute(0, 2, 4, 6, 3, 5, 7, 1, 8, 9, 10)
    return boxes.reshape(-1, pixels.shape[1] * math.prod(tube.kernel))
