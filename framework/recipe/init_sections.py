"""How a video model is made of an image model: the section `init.image`."""

from __future__ import annotations

from typing import Literal

from framework.recipe.sections import Folder, Section

__all__ = ["ImageInit"]


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
