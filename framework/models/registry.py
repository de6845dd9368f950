"""The models that a recipe can name."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from framework.errors import RecipeError
from framework.models.inputs import InputSpec, inputs_of
from framework.models.scaleup import BridgedTokenizer, ScaledTubeViT
from framework.models.tokenizer import TubeTokenizer
from framework.models.tubevit import Size, TubeViT
from framework.models.video_registry import build_video_model, view_sizes
from framework.recipe.model_names import MODEL_NAMES, model_families, model_names
from framework.recipe.patches import tube_of
from framework.recipe.schema import MTV, AnyModel, Model, Tube
from framework.recipe.tube_sets import tubes_of

__all__ = [
    "SIZES",
    "InputSpec",
    "build_model",
    "build_tokenizer",
    "inputs_of",
    "model_families",
    "model_names",
    "size_of",
]

log = logging.getLogger(__name__)

SIZES = {
    "ti": Size(width=192, depth=12, heads=3, mlp_width=768),
    "s": Size(width=384, depth=12, heads=6, mlp_width=1536),
    "b": Size(width=768, depth=12, heads=12, mlp_width=3072),
    "l": Size(width=1024, depth=24, heads=16, mlp_width=4096),
    "h": Size(width=1280, depth=32, heads=16, mlp_width=5120),
}
"""B, L and H are those of the paper (Table 11), Ti and S those of DeiT.

With the paper's two heads (600 and 1000 classes), B has 89.5 M parameters, L 308.6 M and H 637.8 M; published
are 90, 311 and 635 M. L: the paper starts from 307 M for the encoder, the number commonly quoted for ViT-L,
while 24 layers of this width with a 16x16 patch kernel have 303.1 M. H: the kernels here have H's full width,
while the paper's H keeps those that were trained in B, with 768 channels.
"""

NAMES = {name: SIZES[size] for name, size in MODEL_NAMES.items()}
"""The encoder of every model by its name."""
NAMES["vivit_ti_m4"] = replace(SIZES["ti"], heads=4)  # three heads have no halves


def size_of(model: AnyModel) -> Size:
    """The numbers of the encoder: those of the name, with single ones overridden by the recipe.

    Without `mlp_width` the MLP keeps four times the width.

    Errors:
        RecipeError: a width that the heads do not divide.
    """
    known = NAMES[model.name]
    if isinstance(model, MTV):
        return view_sizes(model)[0]
    width, heads = model.width or known.width, model.heads or known.heads
    if width % heads:
        working = [count for count in range(1, width + 1) if width % count == 0 and width // count >= 8]
        raise RecipeError(
            f"model.width {width} cannot be cut into {heads} heads; "
            f"model.heads that work: {', '.join(map(str, working)) or 'none'}"
        )
    return Size(width, model.depth or known.depth, heads, model.mlp_width or 4 * width)


def build_model(model: AnyModel, inputs: Mapping[str, InputSpec]) -> nn.Module:
    """Build the model of a recipe with random weights, drawn from torch's global generator.

    Errors:
        RecipeError: the recipe's `model` section does not describe a model.
        ModelError: a tube does not fit a source; the message names both.
    """
    size = size_of(model)
    _check_rates(model)
    _check_source_names(inputs)
    if not isinstance(model, Model):
        return build_video_model(model, size, inputs)
    if model.position == "printed":
        log.warning(
            "model.position: printed takes the formula as the paper prints it, which is degenerate: all but "
            "a few channels are the same for all tokens; `fixed` is what the authors' other code computes"
        )
    tubes = tubes_of(model)
    if model.scale_up is not None:
        return ScaledTubeViT(
            size,
            tubes,
            inputs,
            model.scale_up,
            position=model.position,
            pool=model.pool,
            dropout=model.dropout,
            stochastic_depth=model.stochastic_depth,
        )
    return TubeViT(
        size,
        tubes,
        inputs,
        interpolated=_interpolated(model, tubes),
        position=model.position,
        pool=model.pool,
        dropout=model.dropout,
        stochastic_depth=model.stochastic_depth,
    )


def build_tokenizer(model: AnyModel, inputs: Mapping[str, InputSpec]) -> TubeTokenizer:
    """The tokenizer that `build_model` would make, alone: for looking at what it learned.

    Errors:
        ModelError: a tube does not fit the width or a source.
        RecipeError: a model with several tokenizers.
    """
    if not isinstance(model, Model):
        return TubeTokenizer([tube_of(model)], size_of(model).width, position="none")
    tubes, width = tubes_of(model), size_of(model).width
    clips = [(spec.frames, spec.size, spec.size) for spec in inputs.values()]
    if model.scale_up is not None:
        narrow = model.scale_up.tube_width
        return BridgedTokenizer(tubes, width, tube_width=narrow, clips=clips, position=model.position)
    return TubeTokenizer(
        tubes,
        width,
        clips=clips,
        position=model.position,
        interpolated=_interpolated(model, tubes),
    )


def _interpolated(model: Model, tubes: tuple[Tube, ...]) -> list[int]:
    """Indices of the tubes without a kernel of their own.

    Tubes with a temporal kernel of 1 keep theirs unless the recipe says otherwise: it reads images too, and
    may come from a trained image model.
    """
    if model.kernels == "independent":
        return []
    return [n for n, tube in enumerate(tubes) if model.interpolate_2d or tube.kernel[0] > 1]


def _check_rates(model: AnyModel) -> None:
    for key in ("dropout", "stochastic_depth"):
        if getattr(model, key, 0) >= 1:
            raise RecipeError(f"model.{key} must be smaller than 1: at 1 nothing would get through")


def _check_source_names(inputs: Mapping[str, InputSpec]) -> None:
    """Names of sources become names of parameters, and torch has rules for those."""
    for name in [*inputs, *(head for spec in inputs.values() for head, _ in spec.heads)]:
        if not name or "." in name or hasattr(nn.ModuleDict, name) or name == "training":
            raise RecipeError(
                f"data.sources: `{name}` cannot name a source or a head, because its classifier could not be "
                "stored under that name; take one without dots that is no word of torch, such as "
                f"`{name.replace('.', '_')}_data`"
            )
