"""The section `augment` of a source: random changes of training samples."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from framework.recipe.sections import BrokenRule, Fraction, Positive, Section

__all__ = ["Augment", "ColorJitter", "RandAugment", "ScaleJitter"]


class ColorJitter(Section):
    """Brightness, saturation, contrast and hue, in a random order, the same for all frames of a clip."""

    probability: Fraction = 0.8
    """Probability of changing brightness, saturation, contrast and hue, all four or none of them."""
    brightness: Fraction = 0.125
    """Largest shift, as a share of the full range (32 of 255)."""
    saturation: Fraction = 0.4
    """Factors from 1 - this to 1 + this."""
    contrast: Fraction = 0.4
    """The same for contrast, about the mean of the whole clip."""
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.2
    """Largest turn of the colour circle to either side, as a share of it."""
    drop: Fraction = 0.1
    """Probability of grey instead of colours, drawn for itself."""


class ScaleJitter(Section):
    """A square crop out of the clip after its short side was brought to a random length (ViViT, Table 7).

    Takes the place of `crop_area` and `crop_ratio`.
    """

    short_side: Positive = 256
    """Pixels, at a scale of 1."""
    scale: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = (0.9, 1.33)
    """Range of the factor on `short_side`; every number in it is equally probable."""

    @model_validator(mode="after")
    def _range_is_a_range(self) -> ScaleJitter:
        if self.scale[0] > self.scale[1]:
            raise BrokenRule(f"must have the smaller number first, not {list(self.scale)}", "scale")
        return self


class RandAugment(Section):
    """RandAugment, the same operations on every frame of a clip (TubeViT Table 10: 2, magnitude 10)."""

    layers: Positive = 2
    """Random operations on each clip, one after another (N in the paper, arXiv 1909.13719, §3)."""
    magnitude: Annotated[float, Field(ge=0, le=30)] = 10.0
    """Strength of the operations that have one; 10 is the full strength of AutoAugment's table, and more goes
    beyond it."""


class Augment(Section):
    """Random changes of training samples; evaluation takes fixed views instead."""

    crop_area: tuple[Fraction, Fraction] = (0.25, 1.0)
    """Range of the crop's share of the frame's area."""
    crop_ratio: tuple[float, float] = (0.75, 1.3333)
    """Range of the crop's width divided by its height."""
    flip: Fraction = 0.5
    """Probability of mirroring left and right; 0 where left and right carry meaning."""
    randaugment: RandAugment | None = None
    """RandAugment, after crop and flip; null: none."""
    color_jitter: ColorJitter | None = None
    """Random colours, after RandAugment; null: none."""
    scale_jitter: ScaleJitter | None = None
    """Square crops at a random scale; null: crops by `crop_area` and `crop_ratio`."""

    @model_validator(mode="after")
    def _ranges_are_ranges(self) -> Augment:
        for name, (low, high) in (("crop_area", self.crop_area), ("crop_ratio", self.crop_ratio)):
            if not 0 < low <= high:
                text = f"must be two numbers greater than 0, the smaller one first, not [{low}, {high}]"
                raise BrokenRule(text, name)
        return self
