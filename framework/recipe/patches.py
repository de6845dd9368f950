"""Patches and tubelets of ViT, ViViT, TimeSformer, VideoMAE and MTV, and whether they fill a clip.

Needs no torch.
"""

from __future__ import annotations

import math

from framework.errors import RecipeError
from framework.recipe.schema import MTV, Model, Recipe, TimeSformer, Tube, VideoMAE, ViT, ViViT

__all__ = ["MTV_FRAMES", "AnyVideoModel", "check_clips_are_divided", "patch_of", "tube_of", "view_frames"]

AnyVideoModel = ViT | ViViT | TimeSformer | VideoMAE | MTV

MTV_FRAMES = (2, 4, 8)
"""Frames of a tubelet of each view of B/2+S/4+Ti/8 (arXiv 2201.04288, §4.1)."""

UNITS = ("frames", "pixels of height", "pixels of width")


def check_clips_are_divided(recipe: Recipe) -> None:
    """Refuse to begin with clips that patches or tubelets do not fill: the rest would be cut off in silence.

    Tubes of a TubeViT are sparse: they leave pixels out by design, and `describe` says how many. A run that
    has begun goes on as it is.

    Errors:
        RecipeError: names the source, and the lengths that work.
    """
    model = recipe.model
    if isinstance(model, Model):
        return
    for name, source in recipe.data.sources.items():
        lengths = (("clip.frames", source.frames), ("size", source.size), ("size", source.size))
        for (key, length), step, unit in zip(lengths, _strides(model), UNITS, strict=True):
            rest = length % step
            if rest and length > step:
                raise RecipeError(
                    f"data.sources.{name}.{key} is {length}, which {step} {unit} of {model.name} do not "
                    f"divide: the last {rest} would never be read. Nearest that work: {length - rest} or "
                    f"{length - rest + step}"
                )


def _strides(model: AnyVideoModel) -> tuple[int, int, int]:
    if isinstance(model, MTV):
        return math.lcm(*view_frames(model)), model.patch, model.patch
    return tube_of(model).stride


def tube_of(model: AnyVideoModel) -> Tube:
    """The tubelet or patch of a model.

    Errors:
        RecipeError: a model with several.
    """
    if isinstance(model, MTV):
        raise RecipeError("MTV has tubelets of several lengths, each with a tokenizer of its own")
    if isinstance(model, TimeSformer):
        return patch_of(1, model.patch)
    if isinstance(model, ViT):
        return patch_of(1, model.patch or (14 if model.name.startswith("vit_h") else 16))
    if isinstance(model, ViViT) and model.embedding == "frames":
        time, height, width = model.tubelet
        return Tube(kernel=(1, height, width), stride=(time, height, width), offset=(time // 2, 0, 0))
    return Tube(kernel=model.tubelet, stride=model.tubelet)


def patch_of(frames: int, pixels: int) -> Tube:
    """A tubelet of so many frames and pixels a side, without overlap."""
    return Tube(kernel=(frames, pixels, pixels), stride=(frames, pixels, pixels))


def view_frames(model: MTV) -> tuple[int, ...]:
    """Frames of a tubelet of each view."""
    return MTV_FRAMES if model.views is None else tuple(view.frames for view in model.views)
