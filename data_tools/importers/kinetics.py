"""Kinetics-400, -600 and -700: videos named by the official list, as CSV or as JSON.

CSV: `label,youtube_id,time_start,time_end,split` (the test lists have no label). JSON: an object of
`{id: {"annotations": {"label", "segment": [start, end]}, "subset"}}`, as DeepMind published them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.importers.listed import Listed, add_listed, check_classes, read_csv, read_json
from data_tools.items import Collection
from framework.errors import DataError

__all__ = ["SPLIT_NAMES", "collect_kinetics", "kinetics_rows"]

_REQUIRED = ("youtube_id", "time_start", "time_end")
SPLIT_NAMES = {
    "validate": "val",
    "validation": "val",
    "valid": "val",
    "training": "train",
    "testing": "test",
}


@dataclass(frozen=True, slots=True)
class Row:
    """One clip of the list; `label` is None in lists of the test split."""

    stem: str
    label: str | None
    split: str | None


def collect_kinetics(
    videos: Path, annotations: Path, name: str, *, split: str, classes: Sequence[str] | None = None
) -> Collection:
    """The clips that the official list `annotations` names for `split`, looked up below `videos`.

    Files are called YOUTUBEID_START_END (six digits each) and lie flat or in folders. Classes are those of
    the whole list in alphabetical order, or `classes`. A list without labels gives samples of unknown class.
    Raises DataError for a list that is not one, a split that it has not, and a label outside `classes`.
    """
    rows = kinetics_rows(annotations)
    labels = {row.label for row in rows if row.label is not None}
    if classes is not None:
        check_classes(annotations, labels, classes)
    order = tuple(classes) if classes is not None else tuple(sorted(labels))
    collection = Collection(name, split, "video", order, fixed_classes=classes is not None)
    listed = [
        Listed(row.stem, row.stem, row.label, folders=_folders(row.label))
        for row in _rows_of_split(rows, split, annotations)
    ]
    add_listed(collection, videos, listed)
    return collection


def _folders(label: str | None) -> tuple[str, ...]:
    """What class folders are called; where several files have the right name, the one in them is taken."""
    return (label, label.replace(" ", "_")) if label else ()


def kinetics_rows(annotations: Path) -> list[Row]:
    """All rows of an official list; DataError for a file that is none."""
    if annotations.suffix.lower() == ".json":
        return list(_rows_of_json(annotations))
    return [_row(annotations, line, row) for line, row in read_csv(annotations, _REQUIRED, "a Kinetics list")]


def _rows_of_json(annotations: Path) -> Iterator[Row]:
    content = read_json(annotations, "a Kinetics list")
    if not isinstance(content, dict) or not content:
        raise DataError(f"{annotations}: not a Kinetics list: an object of clips is expected, or it is empty")
    for identifier, about in content.items():
        try:
            start, end = about["annotations"]["segment"]
            label = about["annotations"].get("label")
            yield Row(_stem(identifier, float(start), float(end)), label or None, about.get("subset"))
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise DataError(
                f"{annotations}: clip {identifier!r} has no segment [start, end] ({error!r})"
            ) from error


def _row(annotations: Path, line: int, row: Mapping[str, Any]) -> Row:
    try:
        stem = _stem(row["youtube_id"], float(row["time_start"]), float(row["time_end"]))
    except (ValueError, OverflowError):  # the latter for an infinite one
        raise DataError(
            f"{annotations}:{line}: time_start and time_end must be seconds, not"
            f" {row['time_start']!r} and {row['time_end']!r}"
        ) from None
    if not row["youtube_id"]:
        raise DataError(f"{annotations}:{line}: the youtube_id is empty")
    return Row(stem, row.get("label") or None, row.get("split") or None)


def _stem(identifier: str, start: float, end: float) -> str:
    return f"{identifier}_{round(start):06d}_{round(end):06d}"


def _rows_of_split(rows: Sequence[Row], split: str, annotations: Path) -> list[Row]:
    """Rows of the wanted split; a list without that column is taken whole."""
    present = sorted({row.split for row in rows if row.split})
    if not present:
        if not rows:
            raise DataError(f"{annotations}: the list is empty")
        return list(rows)
    wanted = SPLIT_NAMES.get(split, split)
    chosen = [row for row in rows if row.split and SPLIT_NAMES.get(row.split, row.split) == wanted]
    if not chosen:
        raise DataError(f"{annotations}: no clip of split {split!r}; there is {', '.join(present)}")
    return chosen
