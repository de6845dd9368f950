"""Where recipes lie: files by path, and those installed with the package by name."""

from __future__ import annotations

import difflib
import importlib.resources
from pathlib import Path

from framework.errors import RecipeError

__all__ = ["find_base", "find_recipe", "near_bases", "recipe_names", "shown"]

SUFFIXES = (".yaml", ".yml")


def installed_folder() -> Path:
    """The folder of the installed package `recipes`."""
    return Path(str(importlib.resources.files("recipes")))


def recipe_names() -> list[str]:
    """Names of the installed recipes, without those that exist only to be a `base:`."""
    folder = installed_folder()
    names = (path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))
    return sorted(name for name in names if not name.startswith("base/"))


def find_recipe(name_or_path: str) -> Path:
    """The file of a recipe: a path that exists or ends with `.yaml`, else the name of an installed one.

    Errors:
        RecipeError: there is no such file or name; says which names are near.
    """
    try:
        path = Path(name_or_path).expanduser()
        folder = path.is_dir()
        if path.exists() and not folder:
            return path
    except (OSError, RuntimeError) as error:
        raise RecipeError(f"cannot look for a recipe {name_or_path}: {error}") from error
    if path.suffix in SUFFIXES and not folder:
        raise RecipeError(f"there is no recipe file {path}{_near_files(path)}")
    installed = installed_folder() / f"{name_or_path}.yaml"
    names = recipe_names()
    if name_or_path in names:
        return installed
    if folder:
        inside = path / "recipe.yaml"
        hint = f"; did you mean {inside}?" if inside.is_file() else ""
        raise RecipeError(f"{path} is a folder, and a recipe is a file{hint}")
    near = difflib.get_close_matches(name_or_path, names, n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(near)}?" if near else f"installed are: {', '.join(names)}."
    raise RecipeError(
        f"there is no recipe named {name_or_path!r}; {hint} A recipe of your own: give its path."
    )


def find_base(name: str, user: Path) -> Path | None:
    """The file that `base:` of the file `user` names: relative to that file, then among the installed."""
    for folder in (user.parent, installed_folder()):
        try:
            candidate = folder / Path(name).expanduser()
            if candidate.is_file():
                return candidate
        except (OSError, RuntimeError, ValueError):  # a name that no file can have
            continue
    return None


def near_bases(name: str, user: Path) -> list[str]:
    """Base files whose names are near `name`, as they may be written in the file `user`."""
    known = {
        path.relative_to(folder).as_posix() for folder in (user.parent,) for path in folder.glob("*.y*ml")
    }
    folder = installed_folder()
    known |= {path.relative_to(folder).as_posix() for path in folder.rglob("*.yaml")}
    return difflib.get_close_matches(name, sorted(known), n=2, cutoff=0.7)


def shown(path: Path) -> str:
    """The path as people want to read it: relative where it lies below the working directory."""
    absolute = path.absolute()
    try:
        return str(absolute.relative_to(Path.cwd()))
    except (ValueError, FileNotFoundError):
        return str(absolute)


def _near_files(path: Path) -> str:
    if not path.parent.is_dir():
        return f" (nor the folder {path.parent})"
    others = [other.name for other in path.parent.iterdir() if other.suffix in SUFFIXES and other.is_file()]
    near = difflib.get_close_matches(path.name, others, n=2, cutoff=0.7)
    return f"; did you mean {' or '.join(str(path.parent / name) for name in near)}?" if near else ""
