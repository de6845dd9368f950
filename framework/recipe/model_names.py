"""The names that `model.name` may take: family, size, and for some families a variant."""

from __future__ import annotations

import difflib
from typing import Annotated

from pydantic import AfterValidator

from framework.recipe.sections import BrokenRule

__all__ = ["MODEL_NAMES", "ModelName", "model_families", "model_names"]

_SIZES = ("ti", "s", "b", "l", "h")
_VARIANTS = {
    "tubevit": ("",),
    "vit": ("",),
    "vivit": ("_m1", "_m2", "_m3", "_m4", "_avgpool"),
    "timesformer": ("_divided", "_joint", "_space"),
    "videomae": ("",),
    "mtv": ("",),
}
MODEL_NAMES = {
    f"{family}_{size}{variant}": size
    for family, variants in _VARIANTS.items()
    for size in _SIZES
    for variant in variants
    if family != "mtv" or size == "b"
}
"""The size of every model by its name; MTV-B is the name of three encoders, of which this is the first."""


def model_names(family: str | None = None) -> list[str]:
    """All names that `model.name` may take, or those of one family."""
    return [name for name in MODEL_NAMES if family in (None, name.partition("_")[0])]


def model_families() -> list[str]:
    """The names of all models for people, a family in a line: `timesformer_{ti,s}_{divided,joint}`."""
    lines = []
    for family, variants in _VARIANTS.items():
        sizes = list(dict.fromkeys(name.split("_")[1] for name in model_names(family)))
        parts = [sizes, [variant.removeprefix("_") for variant in variants if variant]]
        lines.append("_".join([family, *(_one_of(words) for words in parts if words)]))
    return lines


def _one_of(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{{{','.join(words)}}}"


def _known(name: str) -> str:
    if name not in MODEL_NAMES:
        near = difflib.get_close_matches(name, MODEL_NAMES, n=1, cutoff=0.0)
        raise BrokenRule(
            f"there is no model `{name}`; did you mean `{near[0]}`? Known are {' '.join(model_families())}"
        )
    return name


ModelName = Annotated[str, AfterValidator(_known)]
"""A name of a model; of another one the error tells which is near, and all that there are."""
