"""Which share of a clip a set of tubes reads, and which sets read most for a given cost.

What a tube reads is a product of one set of positions per axis, kept as the bits of an integer. So the union
of a few tubes is counted exactly by inclusion and exclusion, without ever making an array of the clip's size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from framework.errors import ModelError, RecipeError
from framework.models.cost import multiply_adds
from framework.models.inputs import InputSpec
from framework.models.tubes import check_tubes, grids_of, sub_stride
from framework.models.tubevit import TubeViT
from framework.recipe.schema import Tube
from framework.recipe.tube_sets import ABLATION_KERNELS

__all__ = ["Found", "coverage", "search"]

Clip = tuple[int, int, int]
Masks = tuple[int, int, int]

# What the search puts together: the kernels of Table 14 with strides and Space-to-Depth factors like those
# of Tables 12 and 14, and the patches that images need.
PATCHES = tuple(Tube(kernel=(1, 16, 16), stride=(step, 16, 16)) for step in (8, 16, 32))
STRIDES = tuple((time, space, space) for time in (8, 16, 32) for space in (16, 32))
FACTORS = ((1, 1, 1), (2, 1, 1), (1, 2, 2))
LARGEST_SET = 4
BEAM = 48
SMALLEST_GAIN = 0.001  # of coverage; less is worth neither a tube nor a higher price


@dataclass(frozen=True)
class Found:
    """A set of tubes under a budget; `coverage` is the share of the clip's pixels that it reads."""

    tubes: tuple[Tube, ...]
    tokens: int
    multiply_adds: int
    coverage: float


@dataclass(frozen=True)
class _Candidate:
    tube: Tube
    tokens: int
    masks: Masks


def coverage(tubes: Sequence[Tube], clip: Clip) -> float:
    """The share of a clip's pixels that at least one tube reads, from 0 to 1.

    Args:
        tubes: shapes of the tubes.
        clip: (frames, height, width); of one frame, only the tube that images share reads.

    Errors:
        ModelError: a tube does not fit the clip.
    """
    grids = grids_of(tubes, clip)
    return _union([_masks(tubes[grid.tube], grid.shape) for grid in grids]) / math.prod(clip)


def search(model: TubeViT, spec: InputSpec, budget: float, *, limit: int = 10) -> list[Found]:
    """Sets of at most four tubes whose forward pass stays within a budget, best coverage first.

    Sets grow by one tube at a time, and only the best `BEAM` of each size grow on: the search takes seconds
    and need not find the very best. Of sets with the same coverage the cheaper comes first; of those with the
    same kernels only the best is returned. Every set can also read images.

    Args:
        model: everything but the tubes is taken from it; it may be on the meta device.
        spec: the video source.
        budget: multiply-adds of one forward pass of one clip.
        limit: how many sets to return.

    Errors:
        RecipeError: no set of tubes is that cheap; the message names the cheapest.
    """
    clip = (spec.frames, spec.size, spec.size)
    candidates = _distinct(_candidate(tube, clip, model.size.width) for tube in _variants())
    patches = [found for tube in PATCHES if (found := _candidate(tube, clip, model.size.width)) is not None]
    if not patches:
        raise RecipeError(
            f"no patch of 16x16 pixels fits clips of {'x'.join(map(str, clip))}: nothing to search"
        )

    def judge(members: Sequence[_Candidate]) -> Found:
        work = multiply_adds(model, [(part.tube, part.tokens) for part in members], spec.classes)
        share = _union([part.masks for part in members]) / math.prod(clip)
        tokens = sum(part.tokens for part in members)
        return Found(tuple(part.tube for part in members), tokens, work, share)

    level = [(judge([patch]), (patch,)) for patch in patches]
    cheapest = min(found.multiply_adds for found, _ in level)
    level = [entry for entry in level if entry[0].multiply_adds <= budget]
    if not level:
        raise RecipeError(
            f"no set of tubes costs at most {budget / 1e9:.4g} GMAC; the cheapest, patches alone, costs "
            f"{cheapest / 1e9:.4g}: raise --gmac, or take a smaller model or smaller clips"
        )
    everything = list(level)
    for _ in range(LARGEST_SET - 1):
        grown = {}
        for parent, members in level:
            for candidate in candidates:
                larger = (*members, candidate)
                found = judge(larger)
                if found.multiply_adds <= budget and found.coverage >= parent.coverage + SMALLEST_GAIN:
                    grown[frozenset(found.tubes)] = (found, larger)
        level = sorted(grown.values(), key=_rank)[:BEAM]
        everything += level
    return _best_of_each_shape(found for found, _ in sorted(everything, key=_rank))[:limit]


def _rank(entry: tuple[Found, object]) -> tuple[int, int]:
    found = entry[0]
    return -round(found.coverage / SMALLEST_GAIN), found.multiply_adds


def _best_of_each_shape(ranked: Iterable[Found]) -> list[Found]:
    """The first of those with the same kernels, and none that only adds tubes to a better one.

    The patches, which come first in every set, do not make a difference.
    """
    kept: dict[tuple[Clip, ...], Found] = {}
    for found in ranked:
        shapes = tuple(sorted(tube.kernel for tube in found.tubes))
        superfluous = any(set(best.tubes[1:]) <= set(found.tubes[1:]) for best in kept.values())
        if shapes not in kept and not superfluous:
            kept[shapes] = found
    return list(kept.values())


def _variants() -> Iterator[Tube]:
    """All tubes that the search may take: each at the corner and in the middle of its stride."""
    for kernel, stride, factors in product(ABLATION_KERNELS, STRIDES, FACTORS):
        corner = Tube(kernel=kernel, stride=stride, space_to_depth=factors)
        yield corner
        room = [(step - size) // 2 for step, size in zip(sub_stride(corner), kernel, strict=True)]
        offset = (0, max(room[1], 0), max(room[2], 0))
        if any(offset):
            yield corner.model_copy(update={"offset": offset})


def _candidate(tube: Tube, clip: Clip, width: int) -> _Candidate | None:
    """The tube and what it reads; None if it fits neither the clip nor the width."""
    try:
        check_tubes([tube], width)
        (grid,) = grids_of([tube], clip)
    except ModelError:
        return None
    return _Candidate(tube, grid.tokens, _masks(tube, grid.shape))


def _distinct(candidates: Iterable[_Candidate | None]) -> list[_Candidate]:
    """Of tubes that read the same pixels, the one with the fewest tokens."""
    best: dict[Masks, _Candidate] = {}
    for candidate in candidates:
        if candidate is not None:
            known = best.get(candidate.masks)
            if known is None or candidate.tokens < known.tokens:
                best[candidate.masks] = candidate
    return list(best.values())


def _masks(tube: Tube, shape: Clip) -> Masks:
    """The positions that a tube reads along each axis, as bits."""
    masks = []
    for axis, step in enumerate(sub_stride(tube)):
        mask = 0
        for number in range(shape[axis] * tube.space_to_depth[axis]):
            mask |= ((1 << tube.kernel[axis]) - 1) << (tube.offset[axis] + number * step)
        masks.append(mask)
    return masks[0], masks[1], masks[2]


def _union(boxes: Sequence[Masks]) -> int:
    """How many pixels at least one of the boxes holds."""
    total = 0
    for number, (time, height, width) in enumerate(boxes):
        size = time.bit_count() * height.bit_count() * width.bit_count()
        if size and number:
            size -= _union([(t & time, h & height, w & width) for t, h, w in boxes[:number]])
        total += size
    return total
