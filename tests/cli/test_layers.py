"""Who may import whom: nothing flows back."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import framework

ROOT = Path(framework.__file__).parent
ORDER = (
    "recipe",
    "data",
    "models",
    "tracking",
    "watch",
    "forecast",
    "evaluation",
    "training",
    "exchange",
)
"""The packages of `framework`; each may import those before it."""
LEAVES = ("framework.data.limits", "framework.data.urls")
"""Modules that import nothing of the packages, so recipes may."""


def imported(path: Path) -> Iterator[str]:
    """The modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            yield node.module or ""
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("package", ORDER)
def test_a_package_imports_only_those_before_it(package: str) -> None:
    later = {f"framework.{name}" for name in ORDER[ORDER.index(package) + 1 :]}
    found = {
        f"{path.relative_to(ROOT)} imports {name}"
        for path in (ROOT / package).rglob("*.py")
        for name in imported(path)
        if name not in LEAVES and ".".join(name.split(".")[:2]) in later
    }
    assert found == set()


@pytest.mark.parametrize("leaf", LEAVES)
def test_a_leaf_imports_no_package(leaf: str) -> None:
    path = ROOT.parent / Path(*leaf.split(".")).with_suffix(".py")
    assert not {name.split(".")[1] for name in imported(path) if name.startswith("framework.")} & set(ORDER)


def test_every_package_has_its_place() -> None:
    assert {path.parent.name for path in ROOT.glob("*/__init__.py")} == set(ORDER)


def test_the_framework_knows_nothing_of_what_uses_it() -> None:
    users = {"launch", "data_tools", "benchmarks", "tests"}
    found = {(path.name, name) for path in ROOT.rglob("*.py") for name in imported(path)}
    assert [one for one in found if one[1].split(".")[0] in users] == []
