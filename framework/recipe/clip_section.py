"""The section of a recipe that says which frames of a video make a clip."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from framework.recipe.sections import BrokenRule, Few, Positive, Section

__all__ = ["Clip", "Sampling"]

Sampling = Literal["dense", "uniform", "random", "center"]


class Clip(Section):
    """How frames are taken from a video: every `stride`-th decoded frame, or `fps` frames a second."""

    frames: Few
    """Frames of a clip."""
    stride: Positive | None = None
    """From one frame of the clip to the next, in decoded frames; null with `fps`, `uniform` and `random`."""
    fps: Annotated[float, Field(gt=0)] | None = None
    """Frames of the clip for each second of the video; null with `stride`, `uniform` and `random`."""
    sampling: Sampling = "dense"
    """`dense`: frames in steps of `stride` or `fps` from a random place on (SlowFast, arXiv 1812.03982);
    `center`: the same from the middle, always; `uniform`: one frame of each of `frames` equal parts of the
    video, at random inside its part (TSN, arXiv 1608.00859); `random`: any frames of the video, in order."""

    @model_validator(mode="after")
    def _one_of_stride_and_fps(self) -> Clip:
        if self.spans_video:
            if self.stride is not None or self.fps is not None:
                text = f"{self.sampling} takes frames of the whole video: leave out `stride` and `fps`"
                raise BrokenRule(text, "sampling")
        elif (self.stride is None) == (self.fps is None):
            raise ValueError(
                "say exactly one of `stride` (in decoded frames) and `fps` (in frames a second); "
                "`null` unsets one that a base says"
            )
        return self

    @property
    def spans_video(self) -> bool:
        """Whether the frames come from the whole video, whatever its length."""
        return self.sampling in ("uniform", "random")
