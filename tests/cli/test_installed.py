"""What is installed from a wheel: complete, and usable outside of the checkout."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("framework", "launch", "data_tools", "recipes")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of this checkout, built from a copy so that nothing is left behind in it."""
    copy = tmp_path_factory.mktemp("copy")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    built = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(built), str(copy)], check=True, capture_output=True)
    (found,) = built.glob("tubeworks-*.whl")
    return found


def test_the_wheel_holds_every_module_and_recipe(wheel: Path) -> None:
    expected = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for suffix in ("*.py", "*.yaml")
        for path in (ROOT / package).rglob(suffix)
    }
    assert expected <= set(zipfile.ZipFile(wheel).namelist())


def test_recipes_are_found_by_name_outside_of_the_checkout(wheel: Path, tmp_path: Path) -> None:
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--target",
        str(site),
        str(wheel),
    ]
    subprocess.run(command, check=True, capture_output=True)

    def tubeworks(*arguments: str) -> str:
        command = [sys.executable, "-m", "launch.cli", *arguments]
        env = {**os.environ, "PYTHONPATH": str(site)}
        return subprocess.run(
            command, check=True, capture_output=True, text=True, cwd=elsewhere, env=env
        ).stdout

    assert {"demo", "tubevit_b_k400_in1k"} <= json.loads(tubeworks("recipe", "list", "--json")).keys()
    found = json.loads(tubeworks("recipe", "show", "tubevit_b_k400_in1k", "--json"))
    assert found["recipe"]["train"]["steps"] == 300000
    assert all(name.startswith(str(site)) for name in found["files"])
    assert len(found["files"]) > 1, "its bases are found too"


def test_the_constraints_are_versions_that_setup_allows() -> None:
    pinned = {
        found[1].lower(): found[2]
        for found in re.finditer(r"(?m)^([A-Za-z0-9_.-]+)==([^;\s]+)", (ROOT / "constraints.txt").read_text())
    }
    requirements = [Requirement(text) for text in importlib.metadata.requires("tubeworks") or []]
    assert requirements
    wrong = [
        f"{requirement} but {version}"
        for requirement in requirements
        if (version := pinned.get(requirement.name.lower())) and not requirement.specifier.contains(version)
    ]
    assert not wrong
    needed = {requirement.name.lower() for requirement in requirements if requirement.marker is None}
    assert needed <= pinned.keys()
