"""Kinetics: videos named by the official list (label, youtube_id, time_start, time_end, split)."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_tools.importers.walk import walk_files
from data_tools.items import VIDEO_SUFFIXES, Collection, Entry, Failure
from data_tools.readers import FileReader
from framework.errors import DataError

__all__ = ["collect_kinetics"]

_REQUIRED = ("youtube_id", "time_start", "time_end")
_SPLIT_NAMES = {
    "validate": "val",
    "validation": "val",
    "valid": "val",
    "training": "train",
    "testing": "test",
}


@dataclass(frozen=True, slots=True)
class _Row:
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
    rows = _read_rows(annotations)
    wanted = _rows_of_split(rows, split, annotations)
    labels = {row.label for row in rows if row.label is not None}
    if classes is not None and (unknown := sorted(labels.difference(classes))):
        raise DataError(
            f"{annotations}: labels that are not in the list of classes: {', '.join(unknown[:10])}"
        )
    order = tuple(classes) if classes is not None else tuple(sorted(labels))
    collection = Collection(name, split, "video", order, fixed_classes=classes is not None)
    files = _find_videos(videos)
    seen: set[str] = set()
    for row in wanted:
        if row.stem in seen:
            collection.failed.append(
                Failure(f"{name}/{row.stem}", "listed twice in the annotations; the first line counts")
            )
            continue
        seen.add(row.stem)
        path = _choose(files.get(row.stem, ()), row.label)
        if path is None:
            collection.missing.append(f"{row.stem}.mp4")
            continue
        source = os.path.relpath(path, videos)
        try:
            reader = FileReader.of(path)
        except OSError as error:
            collection.failed.append(Failure(f"{name}/{row.stem}", f"cannot be read: {error.strerror}"))
        else:
            collection.entries.append(Entry(source, row.stem, row.label, reader))
    collection.missing.sort()
    return collection


def _read_rows(annotations: Path) -> list[_Row]:
    try:
        with annotations.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            columns = [column.strip() for column in reader.fieldnames or ()]
            reader.fieldnames = columns
            if absent := [column for column in _REQUIRED if column not in columns]:
                raise DataError(
                    f"{annotations}: not a Kinetics list: no column {', '.join(absent)}; the first line must"
                    " name label, youtube_id, time_start, time_end and, if there are several, split"
                )
            return [_row(annotations, reader.line_num, row) for row in reader]
    except OSError as error:
        raise DataError(f"{annotations}: cannot be read ({error.strerror}); check --annotations") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{annotations}: not a CSV file in UTF-8 ({error})") from error


def _row(annotations: Path, line: int, row: Mapping[str, str | None]) -> _Row:
    try:
        start, end = (round(float(row[column] or "")) for column in ("time_start", "time_end"))
    except ValueError:
        raise DataError(
            f"{annotations}:{line}: time_start and time_end must be seconds, not"
            f" {row['time_start']!r} and {row['time_end']!r}"
        ) from None
    identifier, label, split = (
        (row.get(column) or "").strip() for column in ("youtube_id", "label", "split")
    )
    if not identifier:
        raise DataError(f"{annotations}:{line}: the youtube_id is empty")
    return _Row(f"{identifier}_{start:06d}_{end:06d}", label or None, split or None)


def _rows_of_split(rows: Sequence[_Row], split: str, annotations: Path) -> list[_Row]:
    """Rows of the wanted split; a list without that column is taken whole."""
    present = sorted({row.split for row in rows if row.split})
    if not present:
        if not rows:
            raise DataError(f"{annotations}: the list is empty")
        return list(rows)
    wanted = _SPLIT_NAMES.get(split, split)
    chosen = [row for row in rows if row.split and _SPLIT_NAMES.get(row.split, row.split) == wanted]
    if not chosen:
        raise DataError(f"{annotations}: no clip of split {split!r}; there is {', '.join(present)}")
    return chosen


def _find_videos(videos: Path) -> dict[str, list[str]]:
    """All video files below `videos`, by their name without suffix; one walk for all clips."""
    if not videos.is_dir():
        raise DataError(f"{videos}: no such folder; check --videos")
    found: dict[str, list[str]] = {}
    for path in walk_files(videos):
        stem, suffix = os.path.splitext(os.path.basename(path))
        if suffix.lower().lstrip(".") in VIDEO_SUFFIXES:
            found.setdefault(stem, []).append(path)
    return found


def _choose(paths: Sequence[str], label: str | None) -> str | None:
    """Of several files with the right name, the one in the folder of its class, else the first by name."""
    if not paths:
        return None
    names = {label, label.replace(" ", "_")} if label else set()
    ranked = sorted(paths, key=lambda path: (os.path.basename(os.path.dirname(path)) not in names, path))
    return ranked[0]
