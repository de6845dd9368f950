"""YAML 1.2 text to values that remember their line, and back.

Recipes need little of YAML: mappings, lists and plain values. So anchors, tags and several documents are
refused, keys are always text, and a key may stand only once. Plain values follow the core schema of YAML 1.2
(§10.3.2): `no`, `12:30` and `1_000` are text, `1e-4` is a number.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Union

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    CollectionStartEvent,
    DocumentStartEvent,
    Event,
    MappingEndEvent,
    MappingStartEvent,
    NodeEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
)

__all__ = ["Node", "Origin", "Problem", "Scalar", "emit", "emit_flow", "parse", "plain"]

Scalar = Union[str, int, float, bool, None]  # noqa: UP007 - evaluated at run time on Python 3.10

MAX_DEPTH = 50

_NULL = re.compile(r"~|null|Null|NULL|")
_TRUE = re.compile(r"true|True|TRUE")
_FALSE = re.compile(r"false|False|FALSE")
_INTEGER = re.compile(r"[-+]?[0-9]+")
_OCTAL = re.compile(r"0o[0-7]+")
_HEXADECIMAL = re.compile(r"0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_INFINITE = re.compile(r"([-+]?)\.(inf|Inf|INF)")
_NAN = re.compile(r"\.(nan|NaN|NAN)")
_PLAIN_TEXT = re.compile(r"[A-Za-z0-9_./][A-Za-z0-9_./@+-]*( [A-Za-z0-9_./@+-]+)*")


@dataclass(frozen=True)
class Origin:
    """Where a value was written: a file's name and line, or the argument on the command line."""

    file: str
    line: int | None = None

    def __str__(self) -> str:
        return self.file if self.line is None else f"{self.file}:{self.line}"


@dataclass(frozen=True)
class Node:
    """A value and where it was written; mappings and lists hold nodes."""

    value: dict[str, Node] | list[Node] | Scalar
    origin: Origin


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a recipe; `key` is dotted and may be empty, `text` is a sentence."""

    origin: Origin
    key: str
    text: str

    def __str__(self) -> str:
        # an override names its key itself
        named = not self.key or f" {self.key}=" in self.origin.file
        return f"{self.origin}: {self.text}" if named else f"{self.origin}: {self.key}: {self.text}"


class _Broken(Exception):
    """Text that cannot be read as YAML at all."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(str(problem))
        self.problem = problem


def plain(node: Node) -> Any:
    """The value without its origins."""
    if isinstance(node.value, dict):
        return {key: plain(child) for key, child in node.value.items()}
    if isinstance(node.value, list):
        return [plain(child) for child in node.value]
    return node.value


def parse(text: str, file: str, *, lines: bool = True) -> tuple[Node | None, list[Problem]]:
    """Read one YAML document; the node is None where nothing could be read or nothing is there.

    `lines=False` is for a text that has no lines to speak of, such as an argument of the command line.
    """
    problems: list[Problem] = []
    reader = _Reader(file, lines, problems)
    try:
        return reader.document(text), problems
    except _Broken as broken:
        return None, [*problems, broken.problem]


class _Reader:
    """Builds nodes from the events of the YAML parser and notes what recipes do not allow."""

    def __init__(self, file: str, lines: bool, problems: list[Problem]) -> None:
        self.file = file
        self.lines = lines
        self.problems = problems
        self.events: Iterator[Event] = iter(())

    def document(self, text: str) -> Node | None:
        """The one document of the text; None where there is nothing in it."""
        if "\0" in text:
            raise _Broken(Problem(Origin(self.file), "", "this is not a text file"))
        root: Node | None = None
        documents = 0
        self.events = self._guarded(YAML(typ="safe", pure=True).parse(text))
        for event in self.events:
            if isinstance(event, DocumentStartEvent):
                documents += 1
                if documents > 1:
                    raise _Broken(
                        Problem(
                            self._origin(event), "", "a second document (`---`) begins here; a recipe is one"
                        )
                    )
            elif isinstance(event, (ScalarEvent, SequenceStartEvent, MappingStartEvent, AliasEvent)):
                root = self._node(event, self._origin(event), (), 0)
        if root is not None and root.value is None:
            return None
        return root

    def _guarded(self, events: Iterator[Event]) -> Iterator[Event]:
        try:
            yield from events
        except MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line = mark.line + 1 if mark is not None and self.lines else None
            text = str(error.problem or error.context or error)
            if r"'\t'" in text:
                text = "a tab stands where YAML wants spaces"
            text = text.replace("'<stream end>'", "the end of the text")
            raise _Broken(Problem(Origin(self.file, line), "", f"not YAML: {text}")) from error
        except (YAMLError, RecursionError) as error:
            text = "nested too deep" if isinstance(error, RecursionError) else str(error).splitlines()[0]
            raise _Broken(Problem(Origin(self.file), "", f"not YAML: {text}")) from error

    def _origin(self, event: Event) -> Origin:
        return Origin(self.file, event.start_mark.line + 1 if self.lines else None)

    def _refuse(self, event: Event, path: tuple[str, ...], text: str) -> None:
        self.problems.append(Problem(self._origin(event), ".".join(path), text))

    def _node(self, event: Event, origin: Origin, path: tuple[str, ...], depth: int) -> Node:
        if depth > MAX_DEPTH:
            raise _Broken(Problem(self._origin(event), "", f"nested deeper than {MAX_DEPTH} levels"))
        if isinstance(event, NodeEvent) and event.anchor:
            sign = "*" if isinstance(event, AliasEvent) else "&"
            text = f"anchors and aliases (`{sign}{event.anchor}`) are not for recipes; use `base:`"
            self._refuse(event, path, text)
        if isinstance(event, (ScalarEvent, CollectionStartEvent)) and event.tag:
            self._refuse(event, path, f"tags (`{event.tag}`) are not for recipes; write a plain value")
        if isinstance(event, MappingStartEvent):
            return Node(self._mapping(path, depth), origin)
        if isinstance(event, SequenceStartEvent):
            return Node(self._list(path, depth), origin)
        if isinstance(event, ScalarEvent):
            text = event.value
            return Node(text if event.style else resolve(text), origin)
        return Node(None, origin)

    def _mapping(self, path: tuple[str, ...], depth: int) -> dict[str, Node]:
        children: dict[str, Node] = {}
        for event in self.events:
            if isinstance(event, MappingEndEvent):
                break
            if not isinstance(event, ScalarEvent):
                raise _Broken(Problem(self._origin(event), ".".join(path), "a key must be plain text"))
            key, origin = event.value, self._origin(event)
            if key in children:
                first = children[key].origin
                self._refuse(event, (*path, key), f"this key stands twice (first in line {first.line or 1})")
            children[key] = self._node(next(self.events), origin, (*path, key), depth + 1)
        return children

    def _list(self, path: tuple[str, ...], depth: int) -> list[Node]:
        children: list[Node] = []
        for event in self.events:
            if isinstance(event, SequenceEndEvent):
                break
            children.append(self._node(event, self._origin(event), (*path, str(len(children))), depth + 1))
        return children


def resolve(text: str) -> Scalar:
    """The value of a plain (unquoted) scalar by the core schema of YAML 1.2."""
    if _NULL.fullmatch(text):
        return None
    if _TRUE.fullmatch(text) or _FALSE.fullmatch(text):
        return _TRUE.fullmatch(text) is not None
    if _INTEGER.fullmatch(text):
        # Python refuses to convert more digits than this, and no recipe needs them
        return int(text) if len(text) < 4000 else text
    if _OCTAL.fullmatch(text) or _HEXADECIMAL.fullmatch(text):
        return int(text, 0)
    if _FLOAT.fullmatch(text):
        return float(text)
    if infinite := _INFINITE.fullmatch(text):
        return float(f"{infinite[1]}inf")
    return float("nan") if _NAN.fullmatch(text) else text


def emit(value: dict[str, Any], comments: dict[str, str] | None = None) -> str:
    """Block YAML of a mapping, readable by `parse` to the same value.

    `comments` maps dotted keys to what is written behind their line.
    """
    rows = list(_rows(value, 0, ()))
    width = min(max((len(text) for text, _ in rows), default=0), 56)
    lines: list[str] = []
    for text, key in rows:
        comment = (comments or {}).get(key)
        lines.append(f"{text:<{width}}  # {comment}" if comment else text)
    return "\n".join(lines) + "\n"


def _rows(value: dict[str, Any], depth: int, path: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    indent = "  " * depth
    for key, child in value.items():
        here = (*path, key)
        head, dotted = f"{indent}{_text(key, is_key=True)}:", ".".join(here)
        if isinstance(child, dict) and child:
            yield head, dotted
            yield from _rows(child, depth + 1, here)
        elif isinstance(child, list) and any(isinstance(item, dict) for item in child):
            yield head, dotted
            for number, item in enumerate(child):
                yield f"{indent}  - {emit_flow(item)}", f"{dotted}.{number}"
        else:
            yield f"{head} {emit_flow(child)}", dotted


def emit_flow(value: Any) -> str:
    """Flow YAML of a value on one line."""
    if isinstance(value, dict):
        return (
            "{"
            + ", ".join(f"{_text(key, is_key=True)}: {emit_flow(child)}" for key, child in value.items())
            + "}"
        )
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(emit_flow(child) for child in value) + "]"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return _float(value)
    return str(value) if isinstance(value, int) else _text(value)


def _float(value: float) -> str:
    if value != value:
        return ".nan"
    if value in (float("inf"), float("-inf")):
        return ".inf" if value > 0 else "-.inf"
    text = repr(value)
    # with a point also YAML 1.1 readers see a number
    return text.replace("e", ".0e") if "e" in text and "." not in text else text


def _text(text: str, *, is_key: bool = False) -> str:
    if _PLAIN_TEXT.fullmatch(text) and (is_key or isinstance(resolve(text), str)):
        return text
    escaped = "".join(_escaped(character) for character in text)
    return f'"{escaped}"'


def _escaped(character: str) -> str:
    if character in '"\\':
        return "\\" + character
    if character.isprintable():
        return character
    return {"\n": "\\n", "\t": "\\t"}.get(character, f"\\U{ord(character):08x}")
