"""Which frames make a clip.

A video that is shorter than the clip is looped from its start, so that every frame of the clip shows motion;
repeating the last frame would teach the model that short videos end in a still.
"""

from __future__ import annotations

from framework.data.randomness import Draws
from framework.recipe.schema import Clip

__all__ = ["frame_step", "random_clip", "still_of", "uniform_clips"]


def frame_step(clip: Clip, fps: float) -> float:
    """Decoded frames from one frame of the clip to the next; `fps` is the video's."""
    if clip.stride is not None:
        return float(clip.stride)
    assert clip.fps is not None
    return fps / clip.fps


def random_clip(clip: Clip, total: int, fps: float, draws: Draws) -> list[int]:
    """Frame indices of a training clip of a video of `total` frames, ascending unless a short video is
    looped.

    By `clip.sampling`: dense and center take a place (all alike, or the middle), uniform and random any
    frames.
    """
    if clip.sampling == "uniform":
        return [_part(total, clip.frames, place + draws.uniform()) for place in range(clip.frames)]
    if clip.sampling == "random":
        return _any_frames(total, clip.frames, draws)
    if clip.sampling == "center":
        return uniform_clips(clip, total, fps, 1)[0]
    return _indices(clip, total, fps, draws.integer(_starts(clip, total, fps)))


def uniform_clips(clip: Clip, total: int, fps: float, views: int) -> list[list[int]]:
    """Frame indices of `views` clips for evaluation, without chance.

    They are spread evenly from the first to the last place; one is the middle. Clips that span the video take
    from each of its parts the frame at the same place, and the views differ by that place.
    """
    if clip.spans_video:
        places = [(view + 0.5) / views for view in range(views)]
        return [[_part(total, clip.frames, part + at) for part in range(clip.frames)] for at in places]
    last = _starts(clip, total, fps) - 1
    if views == 1:
        return [_indices(clip, total, fps, last // 2)]
    return [_indices(clip, total, fps, round(view * last / (views - 1))) for view in range(views)]


def still_of(still: str, total: int, draws: Draws) -> int:
    """The frame of a video that stands for it as an image in training."""
    return total // 2 if still == "center" else draws.integer(total)


def _part(total: int, parts: int, at: float) -> int:
    """The frame at a place between 0 and `parts` of a video that is cut into so many equal parts."""
    return min(total - 1, int(at * total / parts))


def _any_frames(total: int, count: int, draws: Draws) -> list[int]:
    """Different frames, ascending; of a shorter video some come more than once."""
    if total < count:
        return sorted(draws.integer(total) for _ in range(count))
    chosen: set[int] = set()
    for last in range(total - count, total):  # Floyd's way: all sets of frames are alike
        frame = draws.integer(last + 1)
        chosen.add(last if frame in chosen else frame)
    return sorted(chosen)


def _starts(clip: Clip, total: int, fps: float) -> int:
    """In how many places the clip fits into the video; at least 1, the start."""
    span = int((clip.frames - 1) * frame_step(clip, fps)) + 1
    return max(1, total - span + 1)


def _indices(clip: Clip, total: int, fps: float, start: int) -> list[int]:
    step = frame_step(clip, fps)
    return [(start + int(place * step)) % total for place in range(clip.frames)]
