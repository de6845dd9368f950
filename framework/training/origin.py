"""A checkpoint that a new run takes weights from, and the model that it is of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from framework.errors import RecipeError
from framework.models.joint import Size
from framework.models.registry import size_of
from framework.recipe.schema import AnyModel

__all__ = ["Origin", "check_same_size", "some"]


@dataclass(frozen=True)
class Origin:
    """A checkpoint that weights come from, for the key `init.ROLE`, and the model that it is of."""

    role: str
    checkpoint: Path
    model: AnyModel

    @property
    def name(self) -> str:
        """The words by which messages call it."""
        return f"init.{self.role} ({self.checkpoint})"


def check_same_size(model: AnyModel, origin: Origin) -> None:
    """Refuse an encoder with other numbers.

    Errors:
        RecipeError: names both.
    """
    ours, theirs = size_of(model), size_of(origin.model)
    if ours != theirs:
        raise RecipeError(
            f"{origin.name} is of another model: {_numbers(theirs)}. This recipe's has {_numbers(ours)}"
        )


def _numbers(size: Size) -> str:
    return f"width {size.width}, depth {size.depth}, {size.heads} heads, MLP {size.mlp_width}"


def some(names: Sequence[str]) -> str:
    """The first few names, and `is` or `are`."""
    shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    return f"{shown} {'is' if len(names) == 1 else 'are'}"
