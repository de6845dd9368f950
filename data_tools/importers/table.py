"""Any list of files as a table: CSV, TSV or Parquet, with columns for path, labels, split and times."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.importers.archive import ArchiveMember, last_of_each, list_archive, split_archive_path
from data_tools.importers.listed import check_classes
from data_tools.items import Collection, Entry, Failure, kind_of_suffix
from data_tools.readers import FileReader, Reader, display
from framework.data.datasets import KINDS, HeadInfo, Kind
from framework.errors import DataError
from framework.targets import TargetKind

__all__ = ["TableColumns", "collect_table", "read_table"]


@dataclass(frozen=True)
class TableColumns:
    """Which column says what.

    One column of `labels` gives a class, several give heads, one with `separator` any number of classes.
    `start` and `end` (seconds) cut a clip out of a video; `key` names samples, else their path does.
    """

    path: str = "path"
    labels: tuple[str, ...] = ()
    separator: str = ""
    split: str = ""
    start: str = ""
    end: str = ""
    key: str = ""

    def __post_init__(self) -> None:
        if bool(self.start) != bool(self.end):
            raise DataError("a segment needs a column for its start and one for its end; say both or none")
        if self.separator and len(self.labels) != 1:
            raise DataError("a separator of labels needs exactly one column of labels")

    @property
    def target(self) -> TargetKind:
        """What a sample is labelled with."""
        if self.separator:
            return "multi"
        return "heads" if len(self.labels) > 1 else "single"

    def named(self) -> list[str]:
        """All columns that the table must have."""
        names = (self.path, *self.labels, self.split, self.start, self.end, self.key)
        return list(dict.fromkeys(name for name in names if name))


def collect_table(
    table: Path,
    root: Path,
    name: str,
    *,
    columns: TableColumns,
    split: str,
    kind: Kind | None = None,
    classes: Sequence[Sequence[str]] = (),
) -> Collection:
    """The files that a table names, at their places below `root`: a folder, or a place in a tar archive.

    With a column of splits only rows of `split` are taken. Classes are those of the whole table in order of
    the alphabet, or `classes`, one list for each column of labels. Raises DataError for a table or columns
    that are none, and for labels outside `classes`.
    """
    rows = read_table(table, columns.named())
    lists = _class_lists(table, rows, columns, classes)
    chosen = _of_split(table, rows, columns.split, split)
    kind = kind or _kind(table, [row[columns.path] for row in chosen])
    heads = tuple(HeadInfo(*pair) for pair in zip(columns.labels, lists, strict=True))
    several = columns.target == "heads"
    collection = Collection(
        name, split, kind, () if several or not lists else lists[0], fixed_classes=bool(classes),
        target=columns.target, heads=heads if several else (),
    )  # fmt: skip
    find = _Finder(root)
    seen: set[str] = set()
    for row in chosen:
        _add(collection, row, columns, find, seen)
    return collection


def read_table(table: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """The named columns of a table as text; what is not there is empty. Raises DataError."""
    from pyarrow import ArrowException, csv, parquet

    try:
        if table.suffix.lower() in (".parquet", ".pq"):
            content = parquet.read_table(table)
        else:
            parsing = csv.ParseOptions(delimiter="\t" if table.suffix.lower() == ".tsv" else ",")
            content = csv.read_csv(table, parse_options=parsing, convert_options=_all_text(table, parsing))
    except (OSError, ArrowException) as error:
        raise DataError(f"{table}: cannot be read as CSV, TSV or Parquet ({error}); check --table") from error
    if absent := [column for column in columns if column not in content.column_names]:
        there = ", ".join(content.column_names)
        raise DataError(f"{table}: no column {', '.join(absent)}; there is {there}")
    if doubled := [column for column in columns if content.column_names.count(column) > 1]:
        raise DataError(f"{table}: several columns are called {', '.join(doubled)}: rename all but one")
    values = {column: content.column(column).to_pylist() for column in columns}
    return [
        {
            column: "" if values[column][row] is None else str(values[column][row]).strip()
            for column in columns
        }
        for row in range(len(content))
    ]


def _all_text(table: Path, parsing: Any) -> Any:
    """Options that keep every column as it is written: 007 is a name, not a number."""
    from pyarrow import csv, string

    with csv.open_csv(table, parse_options=parsing) as reader:
        names = reader.schema.names
    return csv.ConvertOptions(column_types=dict.fromkeys(names, string()), strings_can_be_null=False)


def _labels_of(row: Mapping[str, str], columns: TableColumns) -> tuple[str, ...]:
    if columns.separator:
        parts = row[columns.labels[0]].split(columns.separator)
        return tuple(dict.fromkeys(part.strip() for part in parts if part.strip()))
    return tuple(row[column] for column in columns.labels)


def _class_lists(
    table: Path,
    rows: Sequence[Mapping[str, str]],
    columns: TableColumns,
    given: Sequence[Sequence[str]],
) -> list[tuple[str, ...]]:
    """The classes of each column of labels."""
    labels = [_labels_of(row, columns) for row in rows]
    if columns.separator:
        present = [{label for row in labels for label in row}]
    else:
        present = [{row[place] for row in labels if row[place]} for place in range(len(columns.labels))]
    if not given:
        return [tuple(sorted(names)) for names in present]
    if len(given) != len(present):
        raise DataError(
            f"{len(given)} lists of classes for {len(present)} columns of labels: give one for each"
        )
    for names, classes in zip(present, given, strict=True):
        check_classes(table, names, classes)
    return [tuple(classes) for classes in given]


def _of_split(
    table: Path, rows: list[dict[str, str]], column: str, split: str
) -> Sequence[Mapping[str, str]]:
    if not rows:
        raise DataError(f"{table}: the table is empty")
    if not column:
        return rows
    chosen = [row for row in rows if row[column] == split]
    if not chosen:
        there = ", ".join(sorted({row[column] for row in rows})[:10])
        raise DataError(f"{table}: no row has {split!r} in its column {column}; there is {there}")
    return chosen


def _kind(table: Path, paths: Sequence[str]) -> Kind:
    found = {kind_of_suffix(path) for path in paths} & set(KINDS)
    if len(found) != 1:
        what = "both images and videos" if found else "neither images nor videos"
        raise DataError(f"{table}: names {what}; one data set is of one kind: say which with --kind")
    return next(kind for kind in KINDS if kind in found)


class _Finder:
    """Files by their place below a folder, or inside an archive."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._members: dict[str, ArchiveMember] | None = None
        if not root.is_dir():
            location = split_archive_path(root)
            if location is None:
                raise DataError(f"{root}: no such folder or archive; check --root")
            self._members = {}
            for member in last_of_each(list_archive(*location)):
                if member.name not in self._members or member.reader is not None:
                    self._members[member.name] = member

    def __call__(self, place: str) -> Reader | str | None:
        """A reader, the reason why there can be none, or None if there is no such file."""
        if self._members is not None:
            member = self._members.get(place)
            return member and (member.reader or member.refused)
        if place.startswith("/") or ".." in place.split("/"):
            return "refused: its path leads out of the folder"
        try:
            return FileReader.of(self._root / place)
        except FileNotFoundError:
            return None
        except OSError as error:
            return f"cannot be read: {error.strerror}"


def _add(
    collection: Collection, row: Mapping[str, str], columns: TableColumns, find: _Finder, seen: set[str]
) -> None:
    place = row[columns.path]
    segment, problem = _segment(row, columns)
    name = row[columns.key] if columns.key else os.path.splitext(place)[0]
    if segment and not columns.key:
        name += f"-{round(segment[0] * 1000):08d}-{round(segment[1] * 1000):08d}"
    key = f"{collection.name}/{display(name)}"
    found = find(place) if place else "the table names no file here"
    promised = kind_of_suffix(place)
    if name in seen:
        problem = "in the table twice; the first row counts"
    elif promised not in (None, collection.kind):
        problem = f"is a {promised}, and this data set holds {collection.kind}s"
    seen.add(name)
    if found is None:
        collection.missing.append(display(place))
    elif problem or isinstance(found, str):
        collection.failed.append(Failure(key, problem or str(found)))
    else:
        labels = _labels_of(row, columns)
        single = (labels[0] or None) if columns.target == "single" and labels else None
        targets = tuple(label or None for label in labels) if columns.target != "single" else ()
        collection.entries.append(Entry(place, name, single, found, targets, segment))


def _segment(row: Mapping[str, str], columns: TableColumns) -> tuple[tuple[float, float] | None, str]:
    """The segment of a row, and what is wrong with it."""
    if not columns.start:
        return None, ""
    try:
        start, end = float(row[columns.start]), float(row[columns.end])
    except ValueError:
        return None, f"its times are no seconds: {row[columns.start]!r} to {row[columns.end]!r}"
    if not 0 <= start < end < math.inf:
        return None, f"its segment is empty or has no end: {start:g} to {end:g} s"
    return (start, end), ""
