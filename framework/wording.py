"""Numbers with their nouns, as people read them."""

from __future__ import annotations

__all__ = ["counted", "plural"]


def plural(noun: str, count: float) -> str:
    """The noun as it stands after a number: `shard` after 1, else `shards`; `class`, `classes`."""
    if count == 1:
        return noun
    return f"{noun}es" if noun.endswith("s") else f"{noun}s"


def counted(count: float, noun: str, none: str = "0") -> str:
    """`1 shard`, `5 shards`, and `0 shards`, or with another word for none."""
    return f"{count or none} {plural(noun, count)}"
