"""Paths of a recipe that mean the same wherever they are read."""

from __future__ import annotations

import os
from pathlib import Path

from framework.recipe.schema import Recipe

__all__ = ["with_absolute_paths"]

SQLITE = "sqlite:///"


def with_absolute_paths(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with the paths that it means in a working folder; URLs stay as they are."""
    values = recipe.model_dump()
    for source in values["data"]["sources"].values():
        for key in ("path", "validation"):
            source[key] = _absolute(source.get(key), folder)
    init = values.get("init") or {}
    for key in ("weights", "tubes", "encoder"):
        if init.get(key):
            init[key] = _absolute(init[key], folder)
    if init.get("image"):
        init["image"]["run"] = _absolute(init["image"]["run"], folder)
    uri = values["tracking"]["uri"] or ""
    if uri.startswith(SQLITE) and not uri.startswith(f"{SQLITE}/"):
        values["tracking"]["uri"] = f"{SQLITE}{_absolute(uri.removeprefix(SQLITE), folder)}"
    return Recipe.model_validate(values)


def _absolute(path: str | None, folder: Path) -> str | None:
    return path if path is None or "://" in path else os.path.abspath(folder / path)
