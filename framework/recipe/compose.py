"""From files and overrides to one checked recipe, and where each of its values came from.

Later wins: the files of `base:` in their order, then the file itself, then the command line. Sections are
merged key by key; lists and plain values replace what stood there, and so does an override.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from framework.errors import RecipeError
from framework.recipe.document import Node, Origin, Problem, emit, parse, plain
from framework.recipe.errors import explain, translate
from framework.recipe.files import find_base, find_recipe, near_bases, shown
from framework.recipe.schema import Recipe

__all__ = ["ResolvedRecipe", "dump_yaml", "flatten", "load_recipe", "recipe_hash", "validate"]

OVERRIDE, DEFAULT = "override", "default"

MAX_CHARACTERS = 1_000_000
"""Of one recipe file; a device or a data file given by mistake would otherwise be read without end."""


@dataclass(frozen=True)
class ResolvedRecipe:
    """A checked recipe, the files it was made of, and its values' origins.

    `provenance` maps the dotted key of every leaf to `file:line`, `override` or `default`.
    """

    recipe: Recipe
    provenance: dict[str, str]
    files: tuple[Path, ...]


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> ResolvedRecipe:
    """Read a recipe by path or name, with its bases and `key.path=value` overrides, and check it.

    Errors:
        RecipeError: lists everything that is wrong, each with its file and line or override.
    """
    path = find_recipe(name_or_path)
    problems: list[Problem] = []
    files: list[Path] = []
    root = _load_file(path, (), problems, files)
    readable = root is not None
    root = root or Node({}, Origin(shown(path), 1))
    for text in overrides:
        root = _override(root, text, problems)
    recipe = None
    if readable:
        recipe, found = validate(root)
        problems += found
    if problems or recipe is None:
        raise RecipeError(explain(shown(path), problems))
    return ResolvedRecipe(recipe, _provenance(recipe, root), tuple(files))


def validate(root: Node) -> tuple[Recipe | None, list[Problem]]:
    """Check composed values against the schema; problems carry the origin of the value they are about."""
    try:
        # by way of JSON: strict there refuses text for numbers, yet takes lists for tuples
        return Recipe.model_validate_json(json.dumps(plain(root)), strict=True), []
    except ValidationError as error:
        return None, translate(error, root, Recipe)


def recipe_hash(recipe: Recipe) -> str:
    """32 hexadecimal digits that are equal for equal recipes, whatever files they came from."""
    text = json.dumps(recipe.model_dump(mode="json"), sort_keys=True, ensure_ascii=False)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def dump_yaml(recipe: Recipe, comments: dict[str, str] | None = None) -> str:
    """The whole recipe as YAML that `load_recipe` reads back to an equal one; see `emit` for `comments`."""
    return emit(recipe.model_dump(mode="json"), comments)


def flatten(recipe: Recipe) -> dict[str, Any]:
    """Dotted key to plain value for every leaf; lists of plain values are leaves."""
    return {".".join(path): value for path, value in _leaves(recipe.model_dump(mode="json"), ())}


def _leaves(value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(value, dict) and value:
        for key, child in value.items():
            yield from _leaves(child, (*path, key))
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for number, child in enumerate(value):
            yield from _leaves(child, (*path, str(number)))
    else:
        yield path, value


def _provenance(recipe: Recipe, root: Node) -> dict[str, str]:
    origins: dict[str, str] = {}
    for path, _ in _leaves(recipe.model_dump(mode="json"), ()):  # the names of results may have dots
        node = _at(root, path)
        written = node and (OVERRIDE if node.origin.line is None else str(node.origin))
        origins[".".join(path)] = written or DEFAULT
    return origins


def _at(node: Node | None, path: Sequence[str]) -> Node | None:
    for key in path:
        if node is not None and isinstance(node.value, dict):
            node = node.value.get(key)
        elif node is not None and isinstance(node.value, list) and _is_index(key, node.value):
            node = node.value[int(key)]
        else:
            return None
    return node


def _is_index(key: str, items: list[Node]) -> bool:
    return key in map(str, range(len(items)))


def _load_file(
    path: Path, chain: tuple[Path, ...], problems: list[Problem], files: list[Path]
) -> Node | None:
    """The file merged over its bases; None where some file could not be read, which is then a problem."""
    name = shown(path)
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MAX_CHARACTERS + 1)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "this is not UTF-8 text"
        problems.append(Problem(Origin(name), "", f"cannot be read: {reason}"))
        return None
    if len(text) > MAX_CHARACTERS:
        text = f"has more than {MAX_CHARACTERS} characters: this is no recipe"
        problems.append(Problem(Origin(name), "", text))
        return None
    if path not in files:
        files.append(path)
    node, found = parse(text, name)
    problems += found
    if node is None or not isinstance(node.value, dict):
        if not found:
            what = "is empty" if node is None else "is not a mapping"
            problems.append(
                Problem(Origin(name, 1), "", f"the file {what}; a recipe has lines like `name: demo`")
            )
        return None
    values = dict(node.value)
    bases = _load_bases(values.pop("base", None), path, (*chain, path.resolve()), problems, files)
    if bases is None:
        return None
    own = Node(values, node.origin)
    for base in reversed(bases):
        own = _merge(base, own)
    return own


def _load_bases(
    base: Node | None, user: Path, chain: tuple[Path, ...], problems: list[Problem], files: list[Path]
) -> list[Node] | None:
    if base is None:
        return []
    entries = base.value if isinstance(base.value, list) else [base]
    loaded: list[Node | None] = []
    for entry in entries:
        if not isinstance(entry.value, str):
            problems.append(Problem(entry.origin, "base", "must be a file name or a list of file names"))
            return None
        path = find_base(entry.value, user)
        if path is None:
            near = near_bases(entry.value, user)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            text = f"there is no file {entry.value} beside this one or among the installed recipes{hint}"
            problems.append(Problem(entry.origin, "base", text))
            loaded.append(None)
        elif path.resolve() in chain:
            circle = [*chain[chain.index(path.resolve()) :], path.resolve()]
            problems.append(
                Problem(entry.origin, "base", "goes in a circle: " + " → ".join(map(shown, circle)))
            )
            loaded.append(None)
        else:
            loaded.append(_load_file(path, chain, problems, files))
    nodes = [node for node in loaded if node is not None]
    return nodes if len(nodes) == len(loaded) else None


def _merge(base: Node, over: Node) -> Node:
    """`over` on top of `base`: mappings key by key, everything else replaces."""
    if not (isinstance(base.value, dict) and isinstance(over.value, dict)):
        return over
    merged = dict(base.value)
    for key, child in over.value.items():
        merged[key] = _merge(merged[key], child) if key in merged else child
    return Node(merged, over.origin)


def _override(root: Node, text: str, problems: list[Problem]) -> Node:
    """The tree with one `key.path=value` of the command line put in; unchanged where that is wrong."""
    origin = Origin(f"command line: {text}")
    key, equals, written = text.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path):
        problems.append(Problem(origin, "", "must look like `key.path=value`, for example `train.steps=100`"))
        return root
    if not text.isprintable():
        problems.append(
            Problem(Origin("command line"), "", f"{text!r} has characters that cannot be printed")
        )
        return root
    if path[0] == "base":
        problems.append(Problem(origin, "", "`base` belongs into the recipe file"))
        return root
    node, found = parse(written, origin.file, lines=False)
    problems += found
    if node is None:
        if written.strip() in ("null", "~"):
            node = Node(None, origin)
        else:
            if not found:
                problems.append(Problem(origin, "", "has no value; write `null` for none"))
            return root
    try:
        return _put(root, path, node, origin)
    except RecipeError as error:
        problems.append(Problem(origin, "", str(error)))
        return root


def _put(
    node: Node | None, path: Sequence[str], value: Node, origin: Origin, done: tuple[str, ...] = ()
) -> Node:
    if not path:
        return value
    here, rest = path[0], path[1:]
    if node is None or node.value is None:
        node = Node({}, origin)
    if isinstance(node.value, dict):
        child = _put(node.value.get(here), rest, value, origin, (*done, here))
        return Node({**node.value, here: child}, node.origin)
    dotted = ".".join(done)
    if isinstance(node.value, list):
        if not _is_index(here, node.value):
            raise RecipeError(
                f"`{dotted}` is a list of {len(node.value)}; `{here}` is not one of its numbers from 0"
            )
        items = list(node.value)
        items[int(here)] = _put(items[int(here)], rest, value, origin, (*done, here))
        return Node(items, node.origin)
    raise RecipeError(f"`{dotted}` is {node.value!r}, not a section: it has no `{here}`")
