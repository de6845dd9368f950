"""A given order of classes: from a text file, an official list, or shards that were made before."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Sequence
from pathlib import Path

from framework.data.datasets import Kind
from framework.data.manifest import MANIFEST_NAME, Manifest
from framework.errors import DataError

__all__ = ["read_classes"]

_SYNSET = re.compile(r"(n\d{8})(\s.*)?")
_CODED = re.compile(r"c(\d{3}) (.+)")
_NUMBERED = re.compile(r"(.+),\s*(\d+)")


def read_classes(path: Path, name: str, kind: Kind) -> tuple[str, ...]:
    """Class names in the order of their labels.

    `path` is a folder of shards, whose data set `name` (or only one of `kind`) is taken: this is how held-out
    data get the labels of the training data. Or it is a file: text with one class a line, and the official
    forms `labels.json` of Something-Something, `moments_categories.txt`, `Charades_v1_classes.txt`,
    `EPIC_100_verb_classes.csv` and `LOC_synset_mapping.txt`. Raises DataError.
    """
    if path.is_dir():
        if not (path / MANIFEST_NAME).exists():
            raise DataError(f"{path}: not a folder of shards; --classes takes one, or a text file of classes")
        return Manifest.open(path).find(None, name, kind).classes
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check --classes") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not text in UTF-8 ({error})") from error
    classes = _of_json(path, text) if path.suffix.lower() == ".json" else _of_lines(path, text)
    if not classes:
        raise DataError(f"{path}: no classes in it; write one a line")
    if len(set(classes)) != len(classes):
        twice = sorted({name for name in classes if classes.count(name) > 1})
        raise DataError(f"{path}: classes that stand there twice: {', '.join(twice[:10])}")
    return classes


def _of_json(path: Path, text: str) -> tuple[str, ...]:
    """A list of names, or an object of names and numbers."""
    try:
        content = json.loads(text)
        if isinstance(content, list):
            return tuple(str(name) for name in content)
        return _by_number(path, [(int(number), name) for name, number in content.items()])
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not a list of classes, nor classes with numbers ({error})") from error


def _of_lines(path: Path, text: str) -> tuple[str, ...]:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if lines and lines[0].split(",")[:2] == ["id", "key"]:
        rows = list(csv.reader(lines))[1:]
        if all(len(row) > 1 and row[0].isdigit() for row in rows):
            return _by_number(path, [(int(row[0]), row[1]) for row in rows])
    for pattern, number, name in ((_CODED, 1, 2), (_NUMBERED, 2, 1)):
        found = [pattern.fullmatch(line) for line in lines]
        pairs = [(int(match[number]), match[name]) for match in found if match]
        if len(pairs) == len(lines) and sorted(n for n, _ in pairs) == list(range(len(pairs))):
            return _by_number(path, pairs)
    if all(_SYNSET.fullmatch(line) for line in lines):
        return tuple(line.split()[0] for line in lines)
    return tuple(lines)


def _by_number(path: Path, pairs: Sequence[tuple[int, str]]) -> tuple[str, ...]:
    if sorted(number for number, _ in pairs) != list(range(len(pairs))):
        raise DataError(f"{path}: its classes are not numbered 0 to {len(pairs) - 1} without gaps")
    return tuple(name for _, name in sorted(pairs))
