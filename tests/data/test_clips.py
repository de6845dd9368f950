"""Promises of clip sampling: every place is reached, rates are kept, short videos loop."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from framework.data.clips import random_clip, still_of, uniform_clips
from framework.data.randomness import Draws
from framework.recipe.schema import Clip

CLIPS = st.one_of(
    st.builds(Clip, frames=st.integers(1, 40), stride=st.integers(1, 5)),
    st.builds(Clip, frames=st.integers(1, 40), fps=st.floats(1.0, 60.0)),
)


@given(CLIPS, st.integers(1, 200), st.floats(5.0, 60.0), st.integers(0, 2**64 - 1), st.integers(1, 5))
def test_indices_are_frames_of_the_video(clip: Clip, total: int, fps: float, seed: int, views: int) -> None:
    for indices in [
        random_clip(clip, total, fps, Draws(seed, "clip")),
        *uniform_clips(clip, total, fps, views),
    ]:
        assert len(indices) == clip.frames
        assert all(0 <= index < total for index in indices)


def test_stride_and_every_start() -> None:
    clip = Clip(frames=4, stride=3)
    clips = [random_clip(clip, 13, 25.0, Draws(seed, "clip")) for seed in range(400)]
    assert all(np.diff(indices).tolist() == [3, 3, 3] for indices in clips)
    starts = np.bincount([indices[0] for indices in clips])
    assert len(starts) == 4  # 0 … 3: the last frame of the video is used
    assert starts.min() > 60


def test_frames_a_second() -> None:
    assert uniform_clips(Clip(frames=5, fps=10.0), 100, 25.0, 2) == [[0, 2, 5, 7, 10], [89, 91, 94, 96, 99]]
    # A slower video repeats frames, so that the clip keeps its length in time.
    assert random_clip(Clip(frames=6, fps=30.0), 3, 15.0, Draws(0, "clip")) == [0, 0, 1, 1, 2, 2]


def test_views_are_spread_from_the_first_to_the_last_place() -> None:
    clip = Clip(frames=4, stride=2)
    assert [view[0] for view in uniform_clips(clip, 27, 25.0, 5)] == [0, 5, 10, 15, 20]
    assert uniform_clips(clip, 27, 25.0, 1) == [[10, 12, 14, 16]]


def test_short_videos_loop() -> None:
    clip = Clip(frames=8, stride=2)
    assert random_clip(clip, 5, 25.0, Draws(1, "clip")) == [0, 2, 4, 1, 3, 0, 2, 4]
    assert uniform_clips(clip, 5, 25.0, 3) == [[0, 2, 4, 1, 3, 0, 2, 4]] * 3
    assert random_clip(clip, 1, 25.0, Draws(1, "clip")) == [0] * 8


@pytest.mark.parametrize("total", [1, 3, 8, 50, 301])
def test_uniform_takes_one_frame_of_each_part_and_random_takes_any(total: int) -> None:
    uniform, anywhere = Clip(frames=8, sampling="uniform"), Clip(frames=8, sampling="random")
    seen = [set(), set()]
    for seed in range(200):
        frames = random_clip(uniform, total, 0.0, Draws(seed, "clip"))
        for part, frame in enumerate(frames):
            assert part * total // 8 <= frame <= (part + 1) * total // 8
        chosen = random_clip(anywhere, total, 0.0, Draws(seed, "clip"))
        assert chosen == sorted(chosen)
        assert len(chosen) == len(frames) == 8
        assert total < 8 or len(set(chosen)) == 8
        assert 0 <= min(chosen + frames) <= max(chosen + frames) < total
        seen[0] |= set(frames)
        seen[1] |= set(chosen)
    for found in seen:
        assert len(found) > 0.95 * total
    if total <= 50:
        assert seen[0] == seen[1] == set(range(total))


def test_views_of_clips_that_span_the_video_differ_and_have_no_chance() -> None:
    clip = Clip(frames=4, sampling="uniform")
    assert uniform_clips(clip, 40, 0.0, 1) == [[5, 15, 25, 35]]
    assert uniform_clips(clip, 40, 0.0, 2) == [[2, 12, 22, 32], [7, 17, 27, 37]]
    middle = Clip(frames=4, stride=2, sampling="center")
    dense = Clip(frames=4, stride=2)
    assert {tuple(random_clip(middle, 40, 25.0, Draws(seed, "clip"))) for seed in range(9)} == {
        (16, 18, 20, 22)
    }
    assert len({tuple(random_clip(dense, 40, 25.0, Draws(seed, "clip"))) for seed in range(50)}) > 10


def test_clips_that_span_the_video_have_no_stride() -> None:
    with pytest.raises(ValueError, match="leave out `stride` and `fps`"):
        Clip(frames=8, stride=2, sampling="uniform")
    with pytest.raises(ValueError, match="exactly one of `stride`"):
        Clip(frames=8, sampling="center")


def test_a_still_is_the_middle_or_any_frame() -> None:
    assert {still_of("center", 9, Draws(seed, "clip")) for seed in range(9)} == {4}
    assert {still_of("random", 9, Draws(seed, "clip")) for seed in range(200)} == set(range(9))
