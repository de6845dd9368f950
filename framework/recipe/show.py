"""A resolved recipe for people and for programs: every value with where it came from."""

from __future__ import annotations

import re
from typing import Any

from framework.recipe.compose import ResolvedRecipe, dump_yaml, recipe_hash
from framework.recipe.files import shown

__all__ = ["report", "show"]

_LIST_ITEM = re.compile(r"(.*?\.\d+)\.")


def show(resolved: ResolvedRecipe) -> str:
    """YAML of the whole recipe; behind each value stands its file and line, `override` or `default`."""
    comments = dict(resolved.provenance)
    for key, origin in resolved.provenance.items():
        # an item of a list is one line, which stands where its first value stands
        if item := _LIST_ITEM.match(key):
            comments.setdefault(item[1], origin)
    return dump_yaml(resolved.recipe, comments)


def report(resolved: ResolvedRecipe) -> dict[str, Any]:
    """The same as a JSON object: recipe, hash, files, and origin per dotted key."""
    return {
        "recipe": resolved.recipe.model_dump(mode="json"),
        "hash": recipe_hash(resolved.recipe),
        "files": [shown(path) for path in resolved.files],
        "provenance": resolved.provenance,
    }
