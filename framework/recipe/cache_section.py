"""Shards in a remote store: their address in a recipe, and `data.cache`, where they are kept on a node."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field

from framework.data.urls import parse_location
from framework.errors import DataError
from framework.recipe.sections import Few, Folder, Section

__all__ = ["Cache", "ShardFolder"]


def _checked(text: str) -> str:
    try:
        parse_location(text)
    except DataError as error:
        raise ValueError(str(error)) from error
    return text


ShardFolder = Annotated[Folder, AfterValidator(_checked)]
"""A path, or an address that shards may be read from and that carries no password."""


class Cache(Section):
    """Whole shards of http(s), s3 and gs, kept on a disk of the node for all its ranks and workers."""

    folder: Folder | None = None
    """On a local disk; by default `tubeworks` in $XDG_CACHE_HOME or ~/.cache."""
    gib: Annotated[float, Field(gt=0)] = 100.0
    """Limit of the folder in GiB; `tubeworks data plan RECIPE --summary` says what a recipe needs."""
    connections: Few = 4
    """Files, or pieces of one file, that a rank fetches at once."""
    stall_seconds: Annotated[float, Field(gt=0)] = 20.0
    """A request that brings no byte for so long is given up and made again."""
    patience_seconds: Annotated[float, Field(ge=0)] = 600.0
    """A file whose store fails for so long ends the run."""
