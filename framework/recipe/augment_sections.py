"""Random changes of training samples that the video recipes ask for beside crops and RandAugment."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from framework.recipe.sections import BrokenRule, Fraction, Positive, Section

__all__ = ["ColorJitter", "ScaleJitter"]


class ColorJitter(Section):
    """Brightness, saturation, contrast and hue, in a random order, the same for all frames of a clip."""

    probability: Fraction = 0.8
    brightness: Fraction = 0.125
    """Largest shift, as a share of the full range (32 of 255)."""
    saturation: Fraction = 0.4
    """Factors from 1 - this to 1 + this."""
    contrast: Fraction = 0.4
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.2
    """Largest turn of the colour circle."""
    drop: Fraction = 0.1
    """Probability of grey instead of colours, drawn for itself."""


class ScaleJitter(Section):
    """A square crop out of the clip after its short side was brought to a random length (ViViT, Table 7).

    Takes the place of `crop_area` and `crop_ratio`.
    """

    short_side: Positive = 256
    """Pixels, at a scale of 1."""
    scale: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = (0.9, 1.33)

    @model_validator(mode="after")
    def _range_is_a_range(self) -> ScaleJitter:
        if self.scale[0] > self.scale[1]:
            raise BrokenRule(f"must have the smaller number first, not {list(self.scale)}", "scale")
        return self
