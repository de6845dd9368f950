"""Which frames make a clip.

A video that is shorter than the clip is looped from its start, so that every frame of the clip shows motion;
repeating the last frame would teach the model that short videos end in a still.
"""

from __future__ import annotations

from framework.data.randomness import Draws
from framework.recipe.schema import Clip

__all__ = ["frame_step", "random_clip", "uniform_clips"]


def frame_step(clip: Clip, fps: float) -> float:
    """Decoded frames from one frame of the clip to the next; `fps` is the video's."""
    if clip.stride is not None:
        return float(clip.stride)
    assert clip.fps is not None
    return fps / clip.fps


def random_clip(clip: Clip, total: int, fps: float, draws: Draws) -> list[int]:
    """Frame indices of a clip at a random place of a video of `total` frames; all places are alike."""
    return _indices(clip, total, fps, draws.integer(_starts(clip, total, fps)))


def uniform_clips(clip: Clip, total: int, fps: float, views: int) -> list[list[int]]:
    """Frame indices of `views` clips, spread evenly from the first to the last place; of one, the middle."""
    last = _starts(clip, total, fps) - 1
    if views == 1:
        return [_indices(clip, total, fps, last // 2)]
    return [_indices(clip, total, fps, round(view * last / (views - 1))) for view in range(views)]


def _starts(clip: Clip, total: int, fps: float) -> int:
    """In how many places the clip fits into the video; at least 1, the start."""
    span = int((clip.frames - 1) * frame_step(clip, fps)) + 1
    return max(1, total - span + 1)


def _indices(clip: Clip, total: int, fps: float, start: int) -> list[int]:
    step = frame_step(clip, fps)
    return [(start + int(place * step)) % total for place in range(clip.frames)]
