"""Something-Something v2: webm files named by a number, and JSON lists of what happens in them.

`train.json` and `validation.json` hold objects with `id`, `label` (the sentence), `template` (the class, its
objects in brackets) and `placeholders`; `test.json` holds `id` alone; `labels.json` maps classes to numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_tools.importers.listed import Listed, add_listed, check_classes, read_json
from data_tools.items import Collection
from framework.errors import DataError

__all__ = ["collect_something", "something_rows"]


def collect_something(
    videos: Path, annotations: Path, name: str, *, split: str, classes: Sequence[str] | None = None
) -> Collection:
    """The videos that `annotations` names, looked up as ID.webm below `videos`.

    A class is the template without its brackets. Classes are in alphabetical order, or `classes`. Sentence
    and placeholders are kept with each sample. Raises DataError for a list that is not one.
    """
    rows = something_rows(annotations)
    present = {row.class_name for row in rows if row.class_name is not None}
    if classes is not None:
        check_classes(annotations, present, classes)
    order = tuple(classes) if classes is not None else tuple(sorted(present))
    collection = Collection(name, split, "video", order, fixed_classes=classes is not None)
    add_listed(collection, videos, rows)
    return collection


def something_rows(annotations: Path) -> list[Listed]:
    """All rows of a list; DataError for a file that is none."""
    content = read_json(annotations, "a list of Something-Something")
    if not isinstance(content, list) or not content:
        raise DataError(
            f"{annotations}: not a list of Something-Something: an array of objects is expected, or it is"
            " empty; take train.json, validation.json or test.json"
        )
    return [_row(annotations, number, row) for number, row in enumerate(content)]


def _row(annotations: Path, number: int, row: Any) -> Listed:
    if not isinstance(row, dict) or not str(row.get("id", "")):
        raise DataError(f"{annotations}: entry {number} has no id")
    identifier, template = str(row["id"]), row.get("template")
    if template is None:
        return Listed(identifier, identifier)
    about = {"text": row.get("label", ""), "placeholders": row.get("placeholders", [])}
    return Listed(identifier, identifier, template.replace("[", "").replace("]", ""), about=about)
