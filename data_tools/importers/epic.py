"""EPIC-Kitchens-100: long videos, and a list of segments with a verb and a noun each.

`EPIC_100_train.csv` and `EPIC_100_validation.csv` have narration_id, video_id, start_timestamp,
stop_timestamp, verb_class and noun_class; the test list has no classes. `EPIC_100_verb_classes.csv` and
`EPIC_100_noun_classes.csv` (id, key) say what the numbers mean.

A segment becomes a clip of its own: frames outside it are not in the shards, so none can ever be sampled, and
a clip of two seconds does not cost reading a video of half an hour.
"""

from __future__ import annotations

import math
from pathlib import Path

from data_tools.importers.classes import read_classes
from data_tools.importers.listed import Listed, add_listed, read_csv
from data_tools.items import Collection
from framework.data.datasets import HeadInfo
from framework.errors import DataError

__all__ = ["collect_epic", "epic_rows"]

_COLUMNS = ("narration_id", "video_id", "start_timestamp", "stop_timestamp")


def collect_epic(
    videos: Path, annotations: Path, name: str, *, split: str, verbs: Path, nouns: Path
) -> Collection:
    """The segments of the list, cut from VIDEOID.mp4 below `videos`, labelled with verb and noun.

    The narration is kept with each sample. Raises DataError for lists that are none, times that are none,
    and classes that are not among those of `verbs` and `nouns`.
    """
    heads = tuple(
        HeadInfo(head, read_classes(path, name, "video")) for head, path in (("verb", verbs), ("noun", nouns))
    )
    collection = Collection(name, split, "video", (), fixed_classes=True, target="heads", heads=heads)
    add_listed(collection, videos, epic_rows(annotations, heads))
    return collection


def epic_rows(annotations: Path, heads: tuple[HeadInfo, ...]) -> list[Listed]:
    """All segments of a list; DataError for a file that is none."""
    rows = []
    for line, row in read_csv(annotations, _COLUMNS, "an EPIC-Kitchens list"):
        where = f"{annotations}:{line}"
        segment = (_seconds(where, row["start_timestamp"]), _seconds(where, row["stop_timestamp"]))
        targets = tuple(_class(where, row.get(f"{head.name}_class", ""), head) for head in heads)
        about = {"text": row["narration"]} if row.get("narration") else None
        rows.append(
            Listed(
                row["narration_id"], row["video_id"], targets=targets, segment=segment, about=about,
                folders=("videos",),
            )
        )  # fmt: skip
    return rows


def _class(where: str, text: str, head: HeadInfo) -> str | None:
    if not text:
        return None
    try:
        number = int(text)
    except ValueError:
        number = -1
    if not 0 <= number < len(head.classes):
        raise DataError(f"{where}: {head.name}_class {text!r} is not one of {len(head.classes)} classes")
    return head.classes[number]


def _seconds(where: str, text: str) -> float:
    """`00:01:02.50` as seconds."""
    try:
        hours, minutes, seconds = text.split(":")
        if not math.isfinite(float(seconds)):
            raise ValueError(seconds)
        return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    except ValueError:
        raise DataError(f"{where}: times are written as 00:01:02.50, not {text!r}") from None
