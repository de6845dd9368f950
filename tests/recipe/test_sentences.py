"""Every field of a recipe has a sentence in the source, where the documentation sends its readers."""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterator

import pytest

from framework.recipe import schema
from framework.recipe.sections import Section


def sections() -> Iterator[type[Section]]:
    """All sections that there are, whoever uses them."""
    found, waiting = set(), [Section]
    while waiting:
        for one in waiting.pop().__subclasses__():
            if one not in found:
                found.add(one)
                waiting.append(one)
                yield one


def sentences(section: type[Section]) -> dict[str, str]:
    """Of the fields that a section has of its own: name -> the string literal below it, or nothing."""
    tree = ast.parse(inspect.getsource(sys.modules[section.__module__]))
    (body,) = (
        one.body for one in tree.body if isinstance(one, ast.ClassDef) and one.name == section.__name__
    )
    found = {}
    for place, node in enumerate(body):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            below = body[place + 1] if place + 1 < len(body) else None
            literal = below.value if isinstance(below, ast.Expr) else None
            text = literal.value if isinstance(literal, ast.Constant) else ""
            found[node.target.id] = text if isinstance(text, str) else ""
    return {name: text for name, text in found.items() if name in section.model_fields}


@pytest.mark.parametrize("section", sorted(sections(), key=lambda one: one.__name__))
def test_every_field_has_a_sentence(section: type[Section]) -> None:
    assert section.__module__.startswith("framework.recipe.")
    assert [name for name, text in sentences(section).items() if not text.strip()] == []


def test_the_sections_of_a_recipe_are_among_them() -> None:
    assert {schema.Recipe, schema.Train, schema.Engine, schema.Source} <= set(sections())
    assert len(sentences(schema.Train)) == len(schema.Train.model_fields)
