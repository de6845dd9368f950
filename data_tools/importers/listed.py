"""Samples that an official list names: each is looked up among the files, and what is not there is said."""

from __future__ import annotations

import csv
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.importers.walk import walk_files
from data_tools.items import VIDEO_SUFFIXES, Collection, Entry, Failure
from data_tools.readers import FileReader
from framework.errors import DataError

__all__ = ["Listed", "add_listed", "check_classes", "read_csv", "read_json"]


@dataclass(frozen=True, slots=True)
class Listed:
    """One sample of a list: its name, the stem of its file, and what `Entry` says of it.

    `folders` are names of folders in which the file is looked for first, where several have its name.
    """

    name: str
    file: str
    class_name: str | None = None
    targets: tuple[str | None, ...] = ()
    segment: tuple[float, float] | None = None
    about: Mapping[str, Any] | None = None
    folders: tuple[str, ...] = ()


def add_listed(collection: Collection, videos: Path, rows: Sequence[Listed]) -> None:
    """Add the samples of a list, whose files lie below `videos`, flat or in folders.

    A sample without a file is missing; one that is listed twice counts once. Raises DataError if `videos` is
    no folder.
    """
    files = _find_videos(videos)
    seen: set[str] = set()
    missing: Counter[str] = Counter()
    for row in rows:
        key = f"{collection.name}/{row.name}"
        if row.name in seen:
            reason = "listed twice in the annotations; the first line counts"
            collection.failed.append(Failure(key, reason))
            continue
        seen.add(row.name)
        path = _choose(files.get(row.file, ()), row.folders)
        if path is None:
            missing[row.file] += 1
            continue
        try:
            reader = FileReader.of(path)
        except OSError as error:
            collection.failed.append(Failure(key, f"cannot be read: {error.strerror}"))
            continue
        source = os.path.relpath(path, videos)
        collection.entries.append(
            Entry(source, row.name, row.class_name, reader, row.targets, row.segment, row.about)
        )
    for name, count in sorted(missing.items()):
        collection.missing.append(f"{name}.mp4" + (f" ({count} segments)" if count > 1 else ""))


def _find_videos(videos: Path) -> dict[str, list[str]]:
    """All video files below `videos`, by their name without suffix; one walk for all samples."""
    if not videos.is_dir():
        raise DataError(f"{videos}: no such folder; check --videos")
    found: dict[str, list[str]] = {}
    for path in walk_files(videos):
        stem, suffix = os.path.splitext(os.path.basename(path))
        if suffix.lower().lstrip(".") in VIDEO_SUFFIXES:
            found.setdefault(stem, []).append(path)
    return found


def _choose(paths: Sequence[str], folders: Sequence[str]) -> str | None:
    """Of several files with the right name, the one in a folder that is asked for, else the first by name."""
    if not paths:
        return None
    return min(paths, key=lambda path: (os.path.basename(os.path.dirname(path)) not in folders, path))


def check_classes(path: Path, present: set[str], classes: Sequence[str]) -> None:
    """Raise DataError if a list has labels that are not among the given classes."""
    if unknown := sorted(present.difference(classes)):
        raise DataError(f"{path}: labels that are not in the list of classes: {', '.join(unknown[:10])}")


def read_csv(
    path: Path, required: Sequence[str], what: str, delimiter: str = ","
) -> Iterator[tuple[int, dict[str, str]]]:
    """Line number and values of each row of a CSV file whose first line names the columns.

    Values are stripped, those that are not there empty. Raises DataError that says that it is not `what`.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, skipinitialspace=True, delimiter=delimiter)
            columns = [column.strip() for column in reader.fieldnames or ()]
            reader.fieldnames = columns
            if absent := [column for column in required if column not in columns]:
                raise DataError(
                    f"{path}: not {what}: no column {', '.join(absent)}; the first line must name"
                    f" {', '.join(required)}"
                )
            for row in reader:
                yield reader.line_num, {name: (row.get(name) or "").strip() for name in columns}
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: not a CSV file in UTF-8 ({error})") from error


def read_json(path: Path, what: str) -> Any:
    """The content of a JSON file; DataError if it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except ValueError as error:
        raise DataError(f"{path}: not {what}: no JSON ({error})") from error
