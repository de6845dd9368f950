"""From the `model` sections of ViT, ViViT, TimeSformer, VideoMAE and MTV to models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypedDict

from torch import nn

from framework.errors import RecipeError
from framework.models.inputs import InputSpec
from framework.models.joint import Size
from framework.models.mtv import MTV as MTVModel
from framework.models.timesformer import Scheme
from framework.models.timesformer import TimeSformer as TimeSformerModel
from framework.models.videomae import VideoMAE as VideoMAEModel
from framework.models.videomae import VideoMAEPretraining
from framework.models.vivit import FactorisedAttention, FactorisedEncoder, SpaceTime
from framework.recipe.patches import AnyVideoModel, patch_of, tube_of, view_frames
from framework.recipe.schema import MTV, Gelu, TimeSformer, ViT, ViViT

__all__ = ["build_video_model", "view_sizes"]

MTV_B = (Size(768, 12, 12, 3072), Size(384, 12, 6, 1536), Size(192, 12, 3, 768))
"""The encoders of B/2+S/4+Ti/8 (arXiv 2201.04288, §4.1), in the order of `MTV_FRAMES`."""
SCHEMES: dict[str, Scheme] = {"divided": "divided", "joint": "joint", "space": "space"}


def build_video_model(model: AnyVideoModel, size: Size, inputs: Mapping[str, InputSpec]) -> nn.Module:
    """Build the model of a section with random weights.

    Errors:
        RecipeError: numbers that do not go together.
        ModelError: a source that is smaller than a tubelet; the message names it.
    """
    if isinstance(model, MTV):
        return _build_mtv(model, inputs)
    if isinstance(model, ViViT):
        return _build_vivit(model, size, inputs)
    tube, options = tube_of(model), _options(model)
    if isinstance(model, ViT):
        return SpaceTime(size, tube, inputs, class_token=model.pool == "class_token", **options)
    if isinstance(model, TimeSformer):
        scheme = SCHEMES[model.name.rpartition("_")[2]]
        return TimeSformerModel(size, tube, inputs, scheme=scheme, **options)
    if model.pretrain is None:
        return VideoMAEModel(size, tube, inputs, **options)
    return VideoMAEPretraining(size, tube, inputs, model.pretrain, **options)


class _Options(TypedDict):
    """What every video model takes."""

    gelu: Gelu
    stochastic_depth: float


def _options(model: AnyVideoModel) -> _Options:
    return {"gelu": model.gelu, "stochastic_depth": model.stochastic_depth}


def _build_vivit(model: ViViT, size: Size, inputs: Mapping[str, InputSpec]) -> nn.Module:
    variant = model.name.rpartition("_")[2]
    tube, class_token, options = tube_of(model), model.pool != "mean", _options(model)
    if variant == "m1":
        return SpaceTime(size, tube, inputs, class_token=class_token, **options)
    if variant in ("m2", "avgpool"):
        depth = model.temporal_depth if variant == "m2" else 0
        return FactorisedEncoder(size, tube, inputs, temporal_depth=depth, class_token=class_token, **options)
    if variant == "m4" and size.heads % 2:
        raise RecipeError(
            f"{model.name} has {size.heads} heads, and model 4 needs an even number: half of them attend "
            "along time. Say `model.heads`"
        )
    first = model.order == "time_space"
    return FactorisedAttention(size, tube, inputs, split=variant == "m4", time_first=first, **options)


def _build_mtv(model: MTV, inputs: Mapping[str, InputSpec]) -> nn.Module:
    sizes = view_sizes(model)
    width = sum(size.width for size in sizes)
    if width % model.global_heads:
        raise RecipeError(
            f"model.global_heads {model.global_heads} do not divide {width}, the width of all views together"
        )
    return MTVModel(
        sizes,
        [patch_of(frames, model.patch) for frames in view_frames(model)],
        inputs,
        fusion_layers=model.fusion_layers,
        global_size=Size(width, model.global_depth, model.global_heads, model.global_mlp_width),
        **_options(model),
    )


def view_sizes(model: MTV) -> list[Size]:
    """The encoder of each view, from the shortest tubelets to the longest.

    Errors:
        RecipeError: a width that the heads do not divide.
    """
    if model.views is None:
        return list(MTV_B)
    for number, view in enumerate(model.views):
        if view.width % view.heads:
            raise RecipeError(
                f"model.views.{number}: width {view.width} cannot be cut into {view.heads} heads"
            )
    return [Size(view.width, view.depth, view.heads, view.mlp_width) for view in model.views]
