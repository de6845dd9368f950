"""Shards against the official lists: which samples are there, and whether classes and labels are theirs."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_tools.importers.charades import charades_rows
from data_tools.importers.classes import read_classes
from data_tools.importers.epic import epic_rows
from data_tools.importers.imagenet import kaggle_rows
from data_tools.importers.kinetics import SPLIT_NAMES, kinetics_rows
from data_tools.importers.moments import moments_rows
from data_tools.importers.something import something_rows
from data_tools.items import clean_stem
from framework.data.datasets import DatasetInfo
from framework.data.manifest import Manifest
from framework.errors import DataError
from framework.wording import counted

__all__ = ["Coverage", "class_problems", "coverage_of", "official_list"]

_HASHED = re.compile(r"-[0-9a-f]{10}$")


@dataclass(frozen=True)
class Coverage:
    """How much of an official list is in the shards.

    `missing` are names of the list that are not there, `unlisted` counts samples that it does not name,
    `relabelled` names samples whose class is another than the list's.
    """

    listed: int
    present: int
    missing: tuple[str, ...]
    unlisted: int
    relabelled: tuple[str, ...]

    @property
    def percent(self) -> float:
        """Share of the list that is there."""
        return 100 * self.present / max(1, self.listed)

    def to_text(self) -> str:
        """One line for people, and the first names that are missing."""
        line = f"official list: {self.percent:.2f} % there ({self.present} of {self.listed})"
        line += f", {counted(self.unlisted, 'sample')} that it does not name" if self.unlisted else ""
        if self.missing:
            more = " …" if len(self.missing) > 10 else ""
            line += f"\n  missing: {', '.join(self.missing[:10])}{more}"
        return line


def official_list(path: Path, split: str) -> Mapping[str, str | None]:
    """Names of samples in an official list, with their class where the list has one of them.

    Understood are the lists that `tubeworks data shard` takes, and Kaggle's of ImageNet. Of a list of several
    splits those of `split` count. Raises DataError for a file that is none of them.
    """
    if path.suffix.lower() == ".json":
        return _first(path, (lambda: _kinetics(path, split), lambda: _something(path)))
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            columns = {column.strip() for column in next(csv.reader(file), [])}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read as CSV ({error}); check --official") from error
    if "youtube_id" in columns:
        return _kinetics(path, split)
    if "narration_id" in columns:
        return {row.name: None for row in epic_rows(path, ())}
    if {"id", "actions"} <= columns:
        return dict.fromkeys(charades_rows(path, 1000))
    if {"ImageId", "PredictionString"} <= columns:
        return dict(kaggle_rows(path))
    return {name.rsplit(".", 1)[0]: label for name, label in moments_rows(path).items()}


def _first(path: Path, ways: Sequence[Callable[[], Mapping[str, str | None]]]) -> Mapping[str, str | None]:
    problems = []
    for way in ways:
        try:
            return way()
        except DataError as error:
            problems.append(str(error))
    raise DataError(f"{path}: no official list: {'; '.join(problems)}")


def _kinetics(path: Path, split: str) -> dict[str, str | None]:
    rows = kinetics_rows(path)
    wanted = SPLIT_NAMES.get(split, split)
    mine = (row for row in rows if not row.split or SPLIT_NAMES.get(row.split, row.split) == wanted)
    return {row.stem: row.label for row in mine}


def _something(path: Path) -> dict[str, str | None]:
    return {row.name: row.class_name for row in something_rows(path)}


def coverage_of(manifest: Manifest, dataset: DatasetInfo, official: Mapping[str, str | None]) -> Coverage:
    """How much of `official` one data set of the shards holds."""
    names = {clean_stem(name): name for name in official}
    mine = manifest.column("dataset") == manifest.datasets.index(dataset)
    found: set[str] = set()
    relabelled: list[str] = []
    unlisted = 0
    for key, label in zip(manifest.column("key")[mine], manifest.column("label")[mine], strict=True):
        stem = str(key).rpartition("/")[2]
        name = names.get(stem) or names.get(_HASHED.sub("", stem))
        if name is None:
            unlisted += 1
            continue
        found.add(name)
        told = official[name]
        if told is not None and label >= 0 and dataset.classes[label] != told:
            relabelled.append(f"{key} ({dataset.classes[label]!r}, the list says {told!r})")
    missing = tuple(sorted(set(official) - found))
    return Coverage(len(official), len(found), missing, unlisted, tuple(relabelled))


def class_problems(dataset: DatasetInfo, path: Path) -> list[str]:
    """How the classes of a data set differ from an official list of them; empty if they do not."""
    official = read_classes(path, dataset.name, dataset.kind)
    here = dataset.class_lists[0]
    lists = {head.name: head.classes for head in dataset.heads} or {"": here}
    if official in lists.values():
        return []
    absent, extra = sorted(set(official) - set(here)), sorted(set(here) - set(official))
    what = [f"{counted(len(absent), 'class')} of it not there ({', '.join(absent[:5])})"] if absent else []
    what += [f"{counted(len(extra), 'class')} not in it ({', '.join(extra[:5])})"] if extra else []
    if not what:
        place = next(n for n, pair in enumerate(zip(official, here, strict=True)) if pair[0] != pair[1])
        what = [f"the order differs: label {place} is {here[place]!r}, there it is {official[place]!r}"]
    return [f"classes of {dataset.name!r} are not those of {path}: {'; '.join(what)}"]
