"""Charades: videos of about thirty seconds in which several actions happen, each with a start and an end.

The official CSV has a column `actions` of the form `c092 11.90 21.20;c147 0.00 12.60`; the file
`Charades_v1_classes.txt` says what the codes mean.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from data_tools.importers.classes import read_classes
from data_tools.importers.listed import Listed, add_listed, read_csv
from data_tools.items import Collection
from framework.errors import DataError

__all__ = ["Action", "charades_rows", "collect_charades"]

_COLUMNS = ("id", "actions", "length")


@dataclass(frozen=True, slots=True)
class Action:
    """One action of a video: its class as an index, and when it happens, in seconds."""

    number: int
    start: float
    end: float


def collect_charades(
    videos: Path, annotations: Path, name: str, *, split: str, classes: Path, segments: bool = False
) -> Collection:
    """The videos of the list, multi-label; with `segments` one clip for each action instead.

    A clip of an action has its class, and those of all actions that go on during at least half of it. The
    actions of a sample, with times from its start, are kept with it. Raises DataError for a list or classes
    that are none.
    """
    names = read_classes(classes, name, "video")
    rows: list[Listed] = []
    for identifier, actions in charades_rows(annotations, len(names)).items():
        if segments:
            rows.extend(_clips(identifier, actions, names))
        else:
            rows.append(_listed(identifier, identifier, actions, names))
    collection = Collection(name, split, "video", names, fixed_classes=True, target="multi")
    add_listed(collection, videos, rows)
    return collection


def charades_rows(annotations: Path, classes: int) -> Mapping[str, tuple[Action, ...]]:
    """Actions by video; DataError for a file that is not the official list."""
    rows: dict[str, tuple[Action, ...]] = {}
    for line, row in read_csv(annotations, _COLUMNS, "a Charades list"):
        try:
            actions = tuple(_action(text) for text in row["actions"].split(";") if text.strip())
        except ValueError:
            raise DataError(
                f"{annotations}:{line}: actions are written as `c092 11.90 21.20;…`, not {row['actions']!r}"
            ) from None
        if unknown := [action.number for action in actions if not 0 <= action.number < classes]:
            raise DataError(f"{annotations}:{line}: there is no class c{unknown[0]:03d} among {classes}")
        rows[row["id"]] = actions
    return rows


def _action(text: str) -> Action:
    code, start, end = text.split()
    action = Action(int(code[1:]), float(start), float(end))
    if not code.startswith("c") or not math.isfinite(action.start) or not math.isfinite(action.end):
        raise ValueError(text)
    return action


def _listed(
    name: str,
    file: str,
    actions: tuple[Action, ...],
    names: tuple[str, ...],
    segment: tuple[float, float] | None = None,
) -> Listed:
    start = segment[0] if segment else 0.0
    about = {
        "actions": [
            [names[action.number], round(action.start - start, 3), round(action.end - start, 3)]
            for action in actions
        ]
    }
    targets = tuple(sorted({names[action.number] for action in actions}))
    return Listed(name, file, targets=targets, segment=segment, about=about)


def _clips(identifier: str, actions: tuple[Action, ...], names: tuple[str, ...]) -> list[Listed]:
    clips = []
    for number, action in enumerate(actions):
        half = (action.end - action.start) / 2
        during = tuple(
            other
            for other in actions
            if other is action or min(action.end, other.end) - max(action.start, other.start) >= half > 0
        )
        segment = (action.start, action.end)
        clips.append(_listed(f"{identifier}-{number:03d}", identifier, during, names, segment))
    return clips
