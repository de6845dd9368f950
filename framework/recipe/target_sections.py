"""What the samples of a source are labelled with, as a recipe says it."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, ValidationInfo, model_validator

from framework.recipe.sections import BrokenRule, Name, Section
from framework.targets import TargetKind, TargetSpec

__all__ = ["Labelled"]

Classes = Annotated[int, Field(gt=0, le=100_000_000)]


def _understood_target(said: dict[str, Any]) -> TargetKind:
    return "heads" if said.get("heads") else "single"


def _understood_classes(said: dict[str, Any]) -> int:
    return sum((said.get("heads") or {}).values())


def _null_is_unsaid(value: Any, info: ValidationInfo) -> Any:
    """`null` unsets what a base says."""
    if value is not None:
        return value
    return _understood_target(info.data) if info.field_name == "target" else _understood_classes(info.data)


class Labelled(Section):
    """The labels of a source: `classes: 400`, with `target: multi`, or `heads: {verb: 97, noun: 300}`.

    All of it is compared with the shards before a run starts.
    """

    heads: dict[Name, Classes] | None = None
    """Several classes for each sample, one for each name, as the shards name and order them."""
    target: Annotated[TargetKind, BeforeValidator(_null_is_unsaid), Field(default_factory=_understood_target)]
    """One class for each sample, or any number (`multi`); `heads` is understood where `heads` are given."""
    classes: Annotated[Classes, BeforeValidator(_null_is_unsaid), Field(default_factory=_understood_classes)]
    """Number of classes; with `heads` it is their sum, and understood."""

    @model_validator(mode="after")
    def _heads_fit(self) -> Labelled:
        if self.classes == 0:
            raise BrokenRule("is missing; it must be an integer greater than 0", "classes")
        if (self.target == "heads") != bool(self.heads):
            heads = "`heads: {NAME: CLASSES, …}`"
            text = f"does not go with {heads}; leave one out" if self.heads else f"needs {heads}"
            raise BrokenRule(text, "target")
        if self.heads and self.classes != sum(self.heads.values()):
            text = (
                f"must be {sum(self.heads.values())}, the sum over `heads`; leave it out (`null` unsets it)"
            )
            raise BrokenRule(text, "classes")
        return self

    @property
    def targets(self) -> TargetSpec:
        """Kind and numbers of the classes."""
        return TargetSpec.of_heads(self.heads) if self.heads else TargetSpec(self.target, (self.classes,))
