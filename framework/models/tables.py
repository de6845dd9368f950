"""Tables of a description for a terminal."""

from __future__ import annotations

from rich import box
from rich.table import Table

__all__ = ["plain_table"]


def plain_table(*headers: str) -> Table:
    """A table whose first column is text and whose others are numbers."""
    result = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for number, header in enumerate(headers):
        result.add_column(header, justify="right" if number else "left", no_wrap=True)
    return result
