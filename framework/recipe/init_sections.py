"""The `init` section of a recipe: the first weights, and how an image model's become a video model's."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from framework.recipe.sections import BrokenRule, Folder, Section

__all__ = ["ImageInit", "Init"]


class ImageInit(Section):
    """A video model's first weights out of a ViT's (arXiv 2103.15691, §3.4)."""

    run: Folder
    """A run of a `vit`, or one checkpoint of it."""
    tubelet: Literal["central", "inflated", "random"] = "central"
    """The patch kernel at the middle frame of the tubelet and zeros elsewhere (equation 9), or at every frame
    and divided by their number (equation 8), or kernels of one's own."""
    positions: Literal["repeated", "resized"] = "repeated"
    """Repeated over time, or zoomed as the square that they are to a square of as many tokens as the video
    has, in the tokens' order, as the authors' code can do it. Another number of patches is interpolated."""
    zero: Literal["output", "all", "none"] = "output"
    """Of the temporal attention in model 3: `output` copies that of the image model and sets the last layer
    to zero; `all` sets everything to zero, as the paper has it, which never learns; `none` copies all."""


class Init(Section):
    """Where weights come from when a run starts; a run that has a checkpoint goes on from that."""

    weights: Folder | None = None
    """Another run (its newest valid checkpoint), or one checkpoint of it: all weights of the same model;
    classifiers are taken where source and number of classes agree, and are new otherwise."""
    tubes: Folder | None = None
    """For `model.scale_up`: a run of a small TubeViT, whose tubes are taken and nothing else."""
    encoder: Folder | None = None
    """For `model.scale_up`: a run of the large model on images, whose 2D patches and encoder are taken."""
    image: ImageInit | None = None
    """For video models: a run of a `vit`, whose patches, places and encoder are taken."""
    ema: bool = False
    """Take the moving averages of the weights."""

    @model_validator(mode="after")
    def _says_where_from(self) -> Init:
        if (self.tubes is None) != (self.encoder is None):
            missing = "encoder" if self.encoder is None else "tubes"
            raise BrokenRule(
                "is missing; a scale-up takes `tubes` from one run and `encoder` from another", missing
            )
        if [self.weights, self.tubes, self.image].count(None) != 2:
            raise ValueError(
                "needs `weights` (a run of the same model, or one of its checkpoints), `image` (a run of a "
                "vit) or, for a scale-up, `tubes` and `encoder`; only one: `null` unsets what a base says"
            )
        return self
