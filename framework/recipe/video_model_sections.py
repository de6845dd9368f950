"""The `model` sections of image ViT, ViViT and the systems it is compared with.

Names say family, size and variant: `vivit_b_m2`. A section holds what its family can vary, and nothing else.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from framework.recipe.model_names import ModelName
from framework.recipe.sections import BrokenRule, Depth, Fraction, Positive, Section, Triple, Width

__all__ = ["MTV", "Gelu", "MTVView", "Masking", "TimeSformer", "ViT", "ViViT", "VideoMAE"]

Gelu = Literal["exact", "tanh"]


class _Named(Section):
    """What all have."""

    scale_up: ClassVar[None] = None
    name: ModelName
    """Family, size and variant, such as `vivit_b_m2`."""
    stochastic_depth: Fraction = 0.0
    """Share of branches that are dropped at the last layer; linearly fewer before (arXiv 1603.09382, §3)."""


class _Encoder(_Named):
    """The numbers of one encoder, each of which overrides that of the name."""

    width: Width | None = None
    """Channels of a token; null: as the name says."""
    depth: Depth | None = None
    """Blocks of the encoder; null: as the name says."""
    heads: Width | None = None
    """Heads of an attention, which must divide the width; null: as the name says."""
    mlp_width: Width | None = None
    """Channels inside an MLP; null: four times the width."""


class ViT(_Encoder):
    """The image transformer (arXiv 2010.11929) that video models start from; `vit_b`. It reads images."""

    patch: Positive | None = None
    """Height and width of a patch in pixels; by default 16, and 14 for `vit_h`."""
    pool: Literal["class_token", "mean"] = "class_token"
    """What is classified: a class token that goes along, or the mean of all tokens."""
    gelu: Gelu = "exact"
    """The exact GELU, or its approximation by tanh, as models trained in JAX have it."""


class ViViT(_Encoder):
    """ViViT, models 1 to 4 (`vivit_b_m1`) and the baseline `vivit_b_avgpool` (arXiv 2103.15691)."""

    tubelet: Triple = (2, 16, 16)
    """(time, height, width) in frames and pixels."""
    embedding: Literal["tubelet", "frames"] = "tubelet"
    """`frames` is uniform frame sampling (§3.2): of a tubelet's frames only the middle one is read."""
    temporal_depth: Depth = 4
    """Layers of model 2's temporal encoder."""
    order: Literal["space_time", "time_space"] = "space_time"
    """Which attention comes first in model 3. The paper has space first, the authors' code time."""
    pool: Literal["class_token", "mean"] | None = None
    """By default a class token in models 1 and 2 and the baseline; models 3 and 4 have none."""
    gelu: Gelu = "tanh"
    """The exact GELU, or its approximation by tanh, which is the one of the authors' code."""

    @model_validator(mode="after")
    def _factorised_models_have_no_class_token(self) -> ViViT:
        if self.pool == "class_token" and self.name.endswith(("_m3", "_m4")):
            raise BrokenRule(
                "class_token does not go with models 3 and 4: a token without a place in space and time has "
                "no axis to attend along (§3.3); leave it out, or say `mean`",
                "pool",
            )
        return self

    @model_validator(mode="after")
    def _options_belong_to_their_model(self) -> ViViT:
        for key, kind in (("temporal_depth", "_m2"), ("order", "_m3")):
            if getattr(self, key) != type(self).model_fields[key].default and not self.name.endswith(kind):
                raise BrokenRule(f"belongs to model {kind[2:]} alone, and this is {self.name}", key)
        return self


class TimeSformer(_Encoder):
    """TimeSformer (arXiv 2102.05095): `timesformer_b_divided`, `_joint` or `_space`."""

    patch: Positive = 16
    """Height and width of a patch in pixels; it has one frame."""
    gelu: Gelu = "exact"
    """The exact GELU, or its approximation by tanh."""


class Masking(Section):
    """Pretraining as a masked autoencoder (arXiv 2203.12602, §3.3)."""

    ratio: Annotated[float, Field(gt=0, lt=1)] = 0.9
    """Share of the places that are masked, the same places in all frames (tube masking)."""
    decoder_width: Width | None = None
    """Channels of the decoder's tokens; null: half the encoder's."""
    decoder_depth: Depth = 4
    """Blocks of the decoder, whose MLPs have four times its width."""
    decoder_heads: Width | None = None
    """Heads of the decoder, which must divide its width; null: half the encoder's."""
    normalised: bool = True
    """The target is each patch with mean 0 and deviation 1 per colour, instead of its pixels."""


class VideoMAE(_Encoder):
    """VideoMAE (arXiv 2203.12602), `videomae_b`: with `pretrain` the autoencoder, else its classifier."""

    tubelet: Triple = (2, 16, 16)
    """(time, height, width) in frames and pixels."""
    pretrain: Masking | None = None
    """How it learns from masked pixels, without labels; null: it is the classifier."""
    gelu: Gelu = "exact"
    """The exact GELU, or its approximation by tanh."""


class MTVView(Section):
    """One view of MTV: tubelets of so many frames, and the size of the encoder that reads them."""

    frames: Positive
    """Frames of a tubelet."""
    width: Width
    """Channels of a token."""
    depth: Depth
    """Blocks of the encoder."""
    heads: Width
    """Heads of an attention, which must divide the width."""
    mlp_width: Width
    """Channels inside an MLP."""


class MTV(_Named):
    """Multiview transformer (arXiv 2201.04288); `mtv_b` is B/2+S/4+Ti/8."""

    patch: Positive = 16
    """Height and width of the tubelets of all views in pixels."""
    views: tuple[MTVView, ...] | None = None
    """From the shortest tubelets to the longest; by default those of the name."""
    fusion_layers: tuple[Annotated[int, Field(ge=0)], ...] = (5, 11)
    """Layers with cross-view attention, counted from 0; a number beyond the deepest view has no effect."""
    global_depth: Depth = 12
    """Layers of the encoder over time at the end, which is as wide as all views together."""
    global_heads: Width = 8
    """Heads of that encoder, which must divide its width."""
    global_mlp_width: Width = 3072
    """Channels inside its MLPs."""
    gelu: Gelu = "tanh"
    """The exact GELU, or its approximation by tanh."""

    @model_validator(mode="after")
    def _views_are_ordered(self) -> MTV:
        frames = [view.frames for view in self.views or ()]
        if self.views is not None and (not frames or frames != sorted(set(frames))):
            raise BrokenRule(
                "must have at least one view, from the shortest tubelets to the longest", "views"
            )
        return self
