"""The wording of what is wrong with a recipe: pydantic's findings as sentences, with line and spelling."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, Tag, ValidationError

from framework.recipe.document import Node, Origin, Problem, emit_flow, plain
from framework.recipe.schema import BrokenRule
from framework.recipe.sections import LARGEST

__all__ = ["explain", "translate"]

Location = tuple[int | str, ...]


def explain(name: str, problems: Sequence[Problem]) -> str:
    """The message of a `RecipeError`: how many things are wrong, and each on a line of its own."""
    count = "one error" if len(problems) == 1 else f"{len(problems)} errors"
    ordered = sorted(dict.fromkeys(problems), key=_place)
    return "\n".join([f"recipe {name} has {count}:", *(f"  {problem}" for problem in ordered)])


def _place(problem: Problem) -> tuple[bool, str, int]:
    # the command line comes last, in the order in which it was written
    line = problem.origin.line
    return (line is None, problem.origin.file if line else "", line or 0)


def translate(error: ValidationError, root: Node, schema: type[BaseModel]) -> list[Problem]:
    """One problem per finding of pydantic, placed where the value was written."""
    problems: dict[Problem, None] = {}
    for finding in error.errors(include_url=False):
        location = _with_tags(schema, finding["loc"])
        broken = finding.get("ctx", {}).get("error")
        if isinstance(broken, BrokenRule):
            location = (*location, *broken.path)
        if location[-1:] == ("[key]",):
            location = location[:-1]
            origin, _ = _find(root, location)
            text = "a name has letters, digits, `_` and `-` only, and begins with a letter or digit"
        elif finding["type"] in ("missing", "too_long", "too_short") and not _is_section(
            schema, location[:-1]
        ):
            # a list of the wrong length: pydantic blames each missing item, people mean the list
            if finding["type"] == "missing":
                location = location[:-1]
            origin, value = _find(root, location)
            text = f"must have {_length(schema, location)}, not {_shown(value)}"
        else:
            origin, value = _find(root, location)
            text = _sentence(finding, schema, location, value)
        problems[Problem(origin, _dotted(location), text)] = None
    return list(problems)


class _Tag(str):
    """The part of a location that says which section of several it is; nobody wrote it as a key."""


def _with_tags(schema: type[BaseModel], location: Location) -> Location:
    """Mark the tags that pydantic puts behind the key of a tagged union."""
    marked: Location = ()
    for key in location:
        marked = (*marked, _Tag(key) if key in _tagged(_bare(_annotation(schema, marked))) else key)
    return marked


def _tagged(annotation: Any) -> dict[Any, Any]:
    """The sections of a tagged union by their tags; empty for anything else."""
    members = get_args(annotation) if get_origin(annotation) is Union else ()
    return {
        part.tag: member
        for member in members
        for part in getattr(member, "__metadata__", ())
        if isinstance(part, Tag)
    }


def _dotted(location: Location) -> str:
    return ".".join(str(key) for key in location if not isinstance(key, _Tag))


def _sentence(finding: Any, schema: type[BaseModel], location: Location, value: Any) -> str:
    kind, context = finding["type"], finding.get("ctx", {})
    if kind == "extra_forbidden":
        return _unknown_key(schema, location)
    if kind == "missing":
        return f"is missing; it must be {_wanted(_annotation(schema, location))}"
    if kind == "value_error":
        return str(context.get("error", finding["msg"]))
    if kind == "literal_error":
        legal = [str(choice) for choice in get_args(_bare(_annotation(schema, location)))]
        return f"must be {_or(legal)}, not {_shown(value)}{_did_you_mean(str(value), legal)}"
    bounds = {
        "greater_than": ("gt", "greater than"),
        "greater_than_equal": ("ge", "at least"),
        "less_than": ("lt", "less than"),
        "less_than_equal": ("le", "at most"),
    }
    if kind in bounds:
        name, words = bounds[kind]
        return f"must be {words} {context[name]}, not {_shown(value)}"
    if kind == "string_pattern_mismatch":
        return f"must match {context['pattern']} (letters, digits, `_`, `-`), not {_shown(value)}"
    if kind in ("too_short", "string_too_short"):
        return "must not be empty"
    wanted = _wanted(_annotation(schema, location))
    hint = ""
    if isinstance(value, float) and value.is_integer() and wanted.startswith("an integer"):
        hint = f"; write {int(value)}"
    elif isinstance(value, str) and _is_number(value) and "text" not in wanted:
        hint = "; write it without quotes"
    return f"must be {wanted}, not {_shown(value)}{hint}"


def _unknown_key(schema: type[BaseModel], location: Location) -> str:
    *parent, key = location
    section = _bare(_annotation(schema, tuple(parent)))
    legal = list(section.model_fields) if _is_model(section) else []
    where = f"`{_dotted(tuple(parent))}`" if parent else "a recipe"
    guess = _did_you_mean(str(key), legal) or "."
    return f"unknown key{guess} Keys of {where}: {', '.join(legal)}"


def _did_you_mean(word: str, legal: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, legal, n=1, cutoff=0.6)
    return f", did you mean `{near[0]}`?" if near else ""


def _find(root: Node, location: Location) -> tuple[Origin, Any]:
    """Origin and value of the deepest node on the way to `location`."""
    node = root
    for key in location:
        if isinstance(key, _Tag):
            continue
        if isinstance(node.value, dict) and str(key) in node.value:
            node = node.value[str(key)]
        elif isinstance(node.value, list) and isinstance(key, int) and key < len(node.value):
            node = node.value[key]
        else:
            break
    return node.origin, plain(node)


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "a section" if value else "an empty section"
    text = (
        f"text {emit_flow(value)}"
        if isinstance(value, str) and not value.isidentifier()
        else emit_flow(value)
    )
    return text if len(text) <= 60 else text[:57] + "…"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _or(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _annotation(schema: type[BaseModel], location: Location) -> Any:
    """The type that the schema wants at `location`, with its metadata; Any where it knows none."""
    wanted: Any = schema
    for key in location:
        bare = _bare(wanted)
        if isinstance(key, _Tag):
            wanted = _tagged(bare)[key]
        elif _is_model(bare):
            field = bare.model_fields.get(str(key))
            if field is None:
                return Any
            wanted = _Wanted(field.annotation, field.metadata)
        elif get_origin(bare) is dict:
            wanted = get_args(bare)[1]
        elif get_origin(bare) in (tuple, list):
            arguments = [argument for argument in get_args(bare) if argument is not Ellipsis]
            wanted = arguments[min(int(key), len(arguments) - 1)] if isinstance(key, int) else Any
        else:
            return Any
    return wanted


class _Wanted:
    """An annotation together with the bounds that pydantic took off it."""

    def __init__(self, annotation: Any, metadata: list[Any]) -> None:
        self.annotation = annotation
        self.metadata = metadata


def _bare(annotation: Any) -> Any:
    """The annotation without bounds, without Annotated and without `| None`."""
    if isinstance(annotation, _Wanted):
        return _bare(annotation.annotation)
    if hasattr(annotation, "__metadata__"):
        return _bare(get_args(annotation)[0])
    arguments = get_args(annotation)
    if type(None) in arguments:
        rest = [argument for argument in arguments if argument is not type(None)]
        return _bare(rest[0]) if len(rest) == 1 else annotation
    return annotation


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _is_section(schema: type[BaseModel], location: Location) -> bool:
    bare = _bare(_annotation(schema, location))
    return _is_model(bare) or get_origin(bare) is dict


def _length(schema: type[BaseModel], location: Location) -> str:
    arguments = get_args(_bare(_annotation(schema, location)))
    return f"{len(arguments)} values" if arguments and Ellipsis not in arguments else "at least one value"


def _bounds(annotation: Any) -> str:
    """Bounds in words, such as ` greater than 0`; empty without any."""
    metadata: list[Any] = []
    while annotation is not None:
        if isinstance(annotation, _Wanted):
            metadata += annotation.metadata
            annotation = annotation.annotation
        elif hasattr(annotation, "__metadata__"):
            metadata += annotation.__metadata__
            annotation = get_args(annotation)[0]
        elif type(None) in get_args(annotation):
            annotation = next(argument for argument in get_args(annotation) if argument is not type(None))
        else:
            break
    words: list[str] = []
    for item in (part for entry in metadata for part in (*getattr(entry, "metadata", ()), entry)):
        for name, text in (
            ("gt", "greater than"),
            ("ge", "at least"),
            ("lt", "less than"),
            ("le", "at most"),
        ):
            bound = getattr(item, name, None)
            if bound not in (None, LARGEST) and f"{text} {bound}" not in words:
                words.append(f"{text} {bound}")
    return (" " + " and ".join(words)) if words else ""


def _wanted(annotation: Any) -> str:
    """The type in words, such as `an integer greater than 0`."""
    bare = _bare(annotation)
    names = {int: "an integer", float: "a number", str: "text", bool: "true or false"}
    if bare in names:
        return names[bare] + _bounds(annotation)
    if _is_model(bare):
        return f"a section with the keys {', '.join(bare.model_fields)}"
    if get_origin(bare) is dict:
        return "a section of names with " + _wanted(get_args(bare)[1])
    if get_origin(bare) in (tuple, list):
        arguments = get_args(bare)
        if Ellipsis in arguments:
            return "a list, each " + _wanted(arguments[0])
        return f"a list of {len(arguments)} values, each {_wanted(arguments[0])}"
    choices = get_args(bare)
    if choices and all(_is_model(_bare(choice)) for choice in choices):
        return "a section with a `name`, and the keys that go with it"
    return _or([str(choice) for choice in choices]) if choices else "another value"
