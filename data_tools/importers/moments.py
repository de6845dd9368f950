"""Moments in Time: three-second videos in class folders, and lists without a first line of names.

`trainingSet.csv` and `validationSet.csv` have `FOLDER/FILE.mp4,label,votes for,votes against`;
`moments_categories.txt` has `label,number`.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path

from data_tools.importers.listed import check_classes
from data_tools.items import Collection, Entry, Failure
from data_tools.readers import FileReader
from framework.errors import DataError

__all__ = ["collect_moments", "moments_rows"]


def collect_moments(
    videos: Path, annotations: Path, name: str, *, split: str, classes: Sequence[str] | None = None
) -> Collection:
    """The videos that the list names, at their places below `videos`.

    Classes are those of the list in alphabetical order, or `classes`. Raises DataError for a list that is
    none, and a label outside `classes`.
    """
    if not videos.is_dir():
        raise DataError(f"{videos}: no such folder; check --videos")
    rows = moments_rows(annotations)
    if classes is not None:
        check_classes(annotations, set(rows.values()), classes)
    order = tuple(classes) if classes is not None else tuple(sorted(set(rows.values())))
    collection = Collection(name, split, "video", order, fixed_classes=classes is not None)
    for place, label in rows.items():
        stem = os.path.splitext(place)[0]
        try:
            reader = FileReader.of(videos / place)
        except FileNotFoundError:
            collection.missing.append(place)
        except OSError as error:
            collection.failed.append(Failure(f"{name}/{stem}", f"cannot be read: {error.strerror}"))
        else:
            collection.entries.append(Entry(place, stem, label, reader))
    return collection


def moments_rows(annotations: Path) -> dict[str, str]:
    """Label of each file of the list; DataError for a file that is none."""
    rows: dict[str, str] = {}
    try:
        with annotations.open(newline="", encoding="utf-8-sig") as file:
            for line, row in enumerate(csv.reader(file), start=1):
                if not row:
                    continue
                place, label = (row[0].strip(), row[1].strip()) if len(row) > 1 else ("", "")
                if "/" not in place or not label or ".." in place.split("/") or place.startswith("/"):
                    raise DataError(
                        f"{annotations}:{line}: not a list of Moments in Time, whose lines are"
                        f" FOLDER/FILE.mp4,label,…; this one is {','.join(row)[:80]!r}"
                    )
                rows[place] = label
    except OSError as error:
        raise DataError(f"{annotations}: cannot be read ({error.strerror}); check the path") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{annotations}: not a CSV file in UTF-8 ({error})") from error
    if not rows:
        raise DataError(f"{annotations}: the list is empty")
    return rows
