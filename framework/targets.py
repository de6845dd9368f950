"""What a sample is labelled with: one class, any number of them, or one class for each of several heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["TargetKind", "TargetSpec", "in_words"]

TargetKind = Literal["single", "multi", "heads"]
"""One class; any number of classes of one list; one class of each of several lists (verb and noun)."""


@dataclass(frozen=True)
class TargetSpec:
    """The kind of a source's labels, and how many classes there are.

    `sizes` are the numbers of classes of the heads, in their order, and `names` their names; for single and
    multi there is one number and no name.
    """

    kind: TargetKind
    sizes: tuple[int, ...]
    names: tuple[str, ...] = ()

    @classmethod
    def single(cls, classes: int) -> TargetSpec:
        """One of so many classes."""
        return cls("single", (classes,))

    @classmethod
    def multi(cls, classes: int) -> TargetSpec:
        """Any number of so many classes."""
        return cls("multi", (classes,))

    @classmethod
    def of_heads(cls, heads: dict[str, int]) -> TargetSpec:
        """One class for each head."""
        return cls("heads", tuple(heads.values()), tuple(heads))

    @property
    def outputs(self) -> int:
        """Logits of a sample; those of the heads stand side by side, in their order."""
        return sum(self.sizes)


def in_words(targets: TargetSpec) -> str:
    """What a sample is labelled with, for messages."""
    if targets.kind == "heads":
        heads = zip(targets.names, targets.sizes, strict=True)
        return f"the heads {', '.join(f'{name} with {size} classes' for name, size in heads)}"
    several = ", any number of them for a sample (target: multi)" if targets.kind == "multi" else ""
    return f"{targets.outputs} classes{several}"
