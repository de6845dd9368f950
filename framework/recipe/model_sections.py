"""The `model` section of a recipe: what is built."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Union

from pydantic import Discriminator, Field, Tag, model_validator

from framework.recipe.model_names import ModelName
from framework.recipe.sections import (
    BrokenRule,
    Depth,
    Fraction,
    Offset,
    Section,
    Triple,
    Width,
)
from framework.recipe.video_model_sections import MTV, TimeSformer, VideoMAE, ViT, ViViT

__all__ = [
    "AnyModel",
    "Model",
    "ModelSection",
    "Pool",
    "Position",
    "ScaleUp",
    "Tube",
    "TubeSet",
    "family_of",
    "reconstructs",
]

Position = Literal["fixed", "fixed_no_stride", "learned", "none", "printed"]
Pool = Literal["attention", "scalar", "map", "mean", "class_token"]
TubeSet = Literal["one", "two", "paper", "paper_dense", "eight", "charades"]


class Tube(Section):
    """One tube shape; axes are (time, height, width) in frames and pixels (TubeViT §3.1, Table 12)."""

    kernel: Triple
    """Extent of the box that makes a token; with Space-to-Depth, of each of its sub-tubes."""
    stride: Triple
    """From one token to the next."""
    offset: Offset = (0, 0, 0)
    """Where the first box begins."""
    space_to_depth: Triple = (1, 1, 1)
    """Sub-tubes of a token along each axis (§3.4), at strides of `stride` divided by this; each makes an
    equal share of the token's channels. 1: one, which is the tube itself."""


class ScaleUp(Section):
    """A large video model from a small one's tubes and a large image model (TubeViT §3.6).

    See `framework.models.scaleup`; `init.tubes` and `init.encoder` say where both come from.
    """

    tube_width: Width
    """Width of the small model; its tubes are brought to the model's width without new weights."""
    frozen_layers: Annotated[int, Field(ge=0, le=1_000)]
    """So many blocks of the encoder are frozen, with everything before them; the next one has the gate."""
    train_tokenizer: bool = False
    """Train tubes and patches too, for a full fine-tuning; needs `frozen_layers: 0`."""
    gate: Literal["scalar", "channel", "none"] = "scalar"
    """tanh(alpha) z_0 is added to the output of the first trained block. The paper has "a learned gating
    parameter", so alpha is one number by default; or one for each channel, or no gate."""
    gate_input: Literal["after_position", "before_position"] = "after_position"
    """z_0: what enters the encoder, as ViT's notation has it, or tokens without their positions. The paper
    calls them the raw input tokens."""

    @model_validator(mode="after")
    def _frozen_from_the_start(self) -> ScaleUp:
        if self.train_tokenizer and self.frozen_layers:
            raise BrokenRule(
                "needs frozen_layers: 0: what comes before frozen blocks is frozen", "train_tokenizer"
            )
        return self


class Model(Section):
    """TubeViT. `name` fixes the size; the optional fields override single numbers of it."""

    name: ModelName = "tubevit_b"
    """Size of the encoder: `tubevit_b`, `_l`, `_h` are those of TubeViT Table 11, `_ti` and `_s` of DeiT."""
    width: Width | None = None
    """Channels of a token; null: as the name says."""
    depth: Depth | None = None
    """Blocks of the encoder; null: as the name says."""
    heads: Width | None = None
    """Heads of an attention, which must divide the width; null: as the name says."""
    mlp_width: Width | None = None
    """Channels inside an MLP; null: four times the width."""
    tubes: tuple[Tube, ...] | None = None
    """The tubes one by one. The first one with a temporal kernel of 1 is shared with images."""
    tube_set: TubeSet | None = None
    """Tubes by name (see `framework.recipe.tube_sets`); by default `paper`, the four of Table 12."""
    kernels: Literal["independent", "interpolated"] = "independent"
    """A kernel for each tube, or one of 8x8x8 resized to all (TubeViT §3.4)."""
    interpolate_2d: bool = False
    """With interpolated kernels: resize it to tubes with a temporal kernel of 1 too, instead of their own."""
    position: Position = "fixed"
    """What tokens are told of their place: sines and cosines of the tube's centre (`fixed`, TubeViT §3.3), of
    the token's index on its grid (`fixed_no_stride`), a learned vector, nothing, or the formula as `printed`,
    which is degenerate."""
    pool: Pool = "attention"
    """One vector out of all tokens: one query with heads, one score per token (`scalar`), a transformer's
    attention pooling with MLP (`map`), the mean, or a class token that goes along."""
    dropout: Fraction = 0.0
    """Share of elements that are dropped after the embedding and in all branches; 0: none. The paper does not
    say where the dropout of its Table 10 stands."""
    stochastic_depth: Fraction = 0.0
    """Share of branches that are dropped at the last layer; linearly fewer before (arXiv 1603.09382, §3)."""
    scale_up: ScaleUp | None = None
    """A large model out of a small one's tubes and an image model; null: a plain TubeViT."""

    @model_validator(mode="after")
    def _options_fit_together(self) -> Model:
        if self.scale_up is not None and self.kernels == "interpolated":
            raise BrokenRule("does not go with `scale_up`, which takes kernels tube by tube", "kernels")
        if self.tubes is not None and self.tube_set is not None:
            text = "is said beside `tubes`; leave one of them out (`null` unsets one that a base says)"
            raise BrokenRule(text, "tube_set")
        if self.interpolate_2d and self.kernels != "interpolated":
            raise BrokenRule("needs `kernels: interpolated`", "interpolate_2d")
        return self


SECTIONS = {
    "tubevit": Model,
    "vit": ViT,
    "vivit": ViViT,
    "timesformer": TimeSformer,
    "videomae": VideoMAE,
    "mtv": MTV,
}


def family_of(model: Any) -> str:
    """The family of a `model` section, by its name; what is unknown counts as a TubeViT.

    So an unknown name is not a wrong section, but a name that `ModelName` refuses.
    """
    name = model.get("name") if isinstance(model, Mapping) else getattr(model, "name", None)
    family = str(name).partition("_")[0]
    return family if family in SECTIONS else "tubevit"


def reconstructs(model: AnyModel) -> bool:
    """Whether a model learns from pixels alone: it has no classifier, and there is nothing to evaluate."""
    return isinstance(model, VideoMAE) and model.pretrain is not None


AnyModel = Union[Model, ViT, ViViT, TimeSformer, VideoMAE, MTV]  # noqa: UP007 - evaluated on Python 3.10
"""The section of any family."""

ModelSection = Annotated[
    Union[  # noqa: UP007
        Annotated[Model, Tag("tubevit")],
        Annotated[ViT, Tag("vit")],
        Annotated[ViViT, Tag("vivit")],
        Annotated[TimeSformer, Tag("timesformer")],
        Annotated[VideoMAE, Tag("videomae")],
        Annotated[MTV, Tag("mtv")],
    ],
    Discriminator(family_of),
]
"""What `model` may be: the section of the family that its name begins with."""
