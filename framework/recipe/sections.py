"""What all sections of a recipe are made of: their base, and the types of their fields."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

__all__ = [
    "LARGEST",
    "BrokenRule",
    "Decay",
    "Depth",
    "Few",
    "Folder",
    "Fraction",
    "Name",
    "NonNegative",
    "Offset",
    "Positive",
    "Section",
    "Triple",
    "Width",
]

LARGEST = 10**12
"""No run has more of anything, and it fits into every integer that it is handed on to."""

Positive = Annotated[int, Field(gt=0, le=LARGEST)]
Few = Annotated[int, Field(gt=0, le=1_000_000)]
"""A count of what is in memory at once."""
NonNegative = Annotated[int, Field(ge=0, le=LARGEST)]
Width = Annotated[int, Field(gt=0, le=1_000_000)]
Depth = Annotated[int, Field(gt=0, le=1_000)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Decay = Annotated[float, Field(ge=0.0, lt=1.0)]
Folder = Annotated[str, Field(min_length=1)]
Triple = tuple[Positive, Positive, Positive]
Offset = tuple[NonNegative, NonNegative, NonNegative]


class BrokenRule(ValueError):
    """Values that are right alone and wrong together; `path` leads from the section to the one to name."""

    def __init__(self, text: str, *path: str) -> None:
        super().__init__(text)
        self.path = path


class Section(BaseModel):
    """Base of all sections: frozen, and closed to unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
