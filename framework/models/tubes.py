"""Sparse video tubes: cut a clip into boxes of several shapes and turn each into a token (TubeViT §3).

The boxes of a tube are a strided view of the clip, copied once and multiplied by the kernel: the result of a
convolution without padding, at a fraction of its time and memory, and without the faults of bf16 convolutions
in several releases of cuDNN. Weights keep a convolution's shape, which is what they are to everybody else.

Space-to-Depth (§3.4) with factors f: the tube has sub-tubes of width / (f_t f_h f_w) channels at strides
divided by f; neighbours are concatenated to one token, time first, then height, then width, then channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from framework.errors import ModelError
from framework.models.layers import join
from framework.models.positions import sincos
from framework.recipe.schema import Tube

__all__ = ["PAPER_TUBES", "Grid", "TubeProjection", "TubeTokenizer", "cut", "grids_of"]

CHANNELS = 3
# The position embedding has a fixed scale of 0.7 per channel. With Xavier's gain of about 1, the motion of a
# digit is still not learned after a hundred small steps, with 3 it is on the way; 6 is worse on images.
GAIN = 3.0
AXES = ("frames", "pixels of height", "pixels of width")

PAPER_TUBES = (
    Tube(kernel=(8, 8, 8), stride=(16, 32, 32), space_to_depth=(2, 1, 1)),
    Tube(kernel=(16, 4, 4), stride=(6, 32, 32), offset=(4, 8, 8), space_to_depth=(1, 2, 2)),
    Tube(kernel=(4, 12, 12), stride=(16, 32, 32), offset=(0, 16, 16)),
    Tube(kernel=(1, 16, 16), stride=(32, 16, 16)),
)
"""Table 12 of the paper. The last one is shared with images."""


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
    if clip[0] == 1:
        flat = [number for number, tube in enumerate(tubes) if tube.kernel[0] == 1]
        if not flat:
            raise ModelError(
                "none of the tubes has a temporal kernel of 1, so nothing can read an image; "
                "add a tube such as {kernel: [1, 16, 16], stride: [32, 16, 16]} to `model.tubes`"
            )
        used = flat[:1]
    else:
        used = list(range(len(tubes)))
    return tuple(Grid(number, _grid(tubes, number, clip)) for number in used)


def name_tube(tubes: Sequence[Tube], number: int) -> str:
    """The words by which messages call a tube."""
    tube = tubes[number]
    parts = {
        "kernel": tube.kernel,
        "stride": tube.stride,
        "offset": tube.offset,
        "space_to_depth": tube.space_to_depth,
    }
    text = ", ".join(f"{key} {'x'.join(map(str, value))}" for key, value in parts.items())
    return f"tube {number + 1} of {len(tubes)} (`model.tubes[{number}]`: {text})"


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
        deviation = GAIN / math.sqrt(CHANNELS * math.prod(tube.kernel))
        nn.init.trunc_normal_(self.weight, std=deviation, a=-2 * deviation, b=2 * deviation)

    def forward(self, boxes: Sequence[Tensor]) -> Tensor:
        """Project what `cut` returned for each group: to (rows of all groups, sub-width)."""
        prepared = join([_normalise(part, self.weight.dtype) for part in boxes])
        return F.linear(prepared, self.weight.flatten(1), self.bias)


def _normalise(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Bring bytes to [-1, 1]; values that are floats already are taken as they are.

    The halves that the subtraction leaves are exact in bf16, so only the product is rounded.
    """
    if values.dtype != torch.uint8:
        return values.to(dtype)
    return values.to(dtype).sub_(127.5).mul_(2 / 255)


class TubeTokenizer(nn.Module):
    """All tubes: clips of several groups to one token matrix, position embedding included."""

    def __init__(self, tubes: Sequence[Tube], width: int, *, positions: bool = True) -> None:
        super().__init__()
        check_tubes(tubes, width)
        self.shapes = tuple(tubes)
        self.width = width
        self.positions = positions
        self.tubes = nn.ModuleList(TubeProjection(tube, width) for tube in tubes)
        # Derived from the shape of a clip alone, so neither is part of the state dict.
        self._grids: dict[tuple[int, int, int], tuple[Grid, ...]] = {}
        self._embeddings: dict[tuple[object, ...], Tensor] = {}

    def grids(self, clip: tuple[int, int, int]) -> tuple[Grid, ...]:
        """`grids_of` for a clip of (frames, height, width), remembered."""
        if clip not in self._grids:
            self._grids[clip] = grids_of(self.shapes, clip)
        return self._grids[clip]

    def embedding(self, clip: tuple[int, int, int], device: torch.device, dtype: torch.dtype) -> Tensor:
        """Position embedding (tokens, width) of all tokens of a clip, remembered per device and type."""
        key = (clip, device, dtype)
        if key not in self._embeddings:
            with torch.inference_mode(False):  # training must be able to use what evaluation remembered
                points = torch.cat([centres(self.shapes[grid.tube], grid.shape) for grid in self.grids(clip)])
                self._embeddings[key] = sincos(points, self.width).to(device, dtype)
        return self._embeddings[key]

    def forward(self, clips: Sequence[Tensor]) -> Tensor:
        """Tokenise; clips (batch, 3, frames, height, width), one tensor a group, to (total_tokens, width).

        Each projection runs once for all groups that it reads, in the order of the tubes.
        """
        clip_shapes = [(clip.shape[2], clip.shape[3], clip.shape[4]) for clip in clips]
        grids = [{grid.tube: grid for grid in self.grids(shape)} for shape in clip_shapes]
        parts: list[list[Tensor]] = [[] for _ in clips]
        for number, (projection, tube) in enumerate(zip(self.tubes, self.shapes, strict=True)):
            readers = [group for group, grid in enumerate(grids) if number in grid]
            if not readers:
                continue
            boxes = [cut(clips[group], tube, grids[group][number].shape) for group in readers]
            projected = projection(boxes).split([len(box) for box in boxes])
            for group, tokens in zip(readers, projected, strict=True):
                # sub-tubes of a token are neighbouring rows, so this view is Space-to-Depth
                parts[group].append(tokens.reshape(len(clips[group]), -1, self.width))
        return join([self._finish(part, shape) for part, shape in zip(parts, clip_shapes, strict=True)])

    def _finish(self, parts: list[Tensor], clip: tuple[int, int, int]) -> Tensor:
        tokens = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        if self.positions:
            tokens = tokens + self.embedding(clip, tokens.device, tokens.dtype)
        return tokens.flatten(0, 1)
