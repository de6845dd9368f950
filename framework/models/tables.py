"""Tables of a description for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.table import Table

__all__ = ["clip_in_words", "plain_table"]


def plain_table(*headers: str) -> Table:
    """A table whose first column is text and whose others are numbers."""
    result = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for number, header in enumerate(headers):
        result.add_column(header, justify="right" if number else "left", no_wrap=True)
    return result


def clip_in_words(source: Mapping[str, Any]) -> str:
    """What a source of a description gives to one forward pass: a clip, or several of each sample."""
    clip = "{frames}x{size}x{size}".format(**source)
    return f"{source['repeats']} views of {clip}" if source.get("repeats", 1) > 1 else clip
