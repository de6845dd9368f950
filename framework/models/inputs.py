"""What a model is told about the sources it will see."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from framework.recipe.schema import Recipe

__all__ = ["InputSpec", "inputs_of"]


@dataclass(frozen=True)
class InputSpec:
    """One source: clips of `frames` square frames of `size` pixels, and `classes` logits for each.

    `heads` are the parts that the logits are made of, by name, where a source has several classifiers.
    """

    kind: Literal["video", "image"]
    frames: int
    size: int
    classes: int
    heads: tuple[tuple[str, int], ...] = ()


def inputs_of(recipe: Recipe) -> dict[str, InputSpec]:
    """The inputs of all sources of a recipe, in its order."""
    return {
        name: InputSpec(
            source.kind,
            source.frames,
            source.size,
            source.classes,
            tuple((source.heads or {}).items()),
        )
        for name, source in recipe.data.sources.items()
    }
