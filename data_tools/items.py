"""What is to be sharded: collections of files as they were found, and items with keys, labels and readers.

A collection is one input (a Kinetics list, a tree of class folders, an archive). `inventory` joins them to
the data sets and items of one set of shards; from there on nothing depends on where an item came from.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from data_tools.readers import Reader, display
from framework.data.datasets import HeadInfo, Kind
from framework.errors import DataError
from framework.targets import TargetKind

__all__ = [
    "IMAGE_SUFFIXES",
    "VIDEO_SUFFIXES",
    "Collection",
    "DatasetPlan",
    "Entry",
    "Failure",
    "Inventory",
    "Item",
    "clean_stem",
    "inventory",
    "kind_of_suffix",
]

IMAGE_SUFFIXES = frozenset({"jpg", "jpeg", "jpe", "png", "webp", "bmp", "gif", "tif", "tiff"})
VIDEO_SUFFIXES = frozenset(
    {"mp4", "m4v", "mov", "mkv", "webm", "avi", "mpg", "mpeg", "ts", "flv", "wmv", "3gp", "ogv"}
)
_DATASET_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_BYTES_A_SECOND = 100_000  # of a clip that was encoded anew
_STEM_LENGTH = 80  # USTAR: the part of a member's name after the last slash has at most 100 bytes


@dataclass(frozen=True, slots=True)
class Entry:
    """A file that was found: its place in the input, the stem for its key, its class (None: unknown).

    In a multi-label collection `targets` are the names of all classes that apply, in any order, and in one
    with heads the name of a class for each head, None where it is not known; `class_name` is None then.
    `segment` is the part of a video that is the sample: from, to, in seconds, the end not included. `about`
    is kept with the sample, in KEY.json.
    """

    source: str
    stem: str
    class_name: str | None
    reader: Reader
    targets: tuple[str | None, ...] = ()
    segment: tuple[float, float] | None = None
    about: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Failure:
    """A file that was left out, and why."""

    key: str
    reason: str


@dataclass
class Collection:
    """One input after looking at names only; `classes` in the order of their labels.

    With `heads` every sample has a class of each; then `classes` is empty and `target` is heads.
    """

    name: str
    split: str
    kind: Kind
    classes: tuple[str, ...]
    entries: list[Entry] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    failed: list[Failure] = field(default_factory=list)
    fixed_classes: bool = False
    """The classes were given and must not be extended by those of another collection."""
    target: TargetKind = "single"
    heads: tuple[HeadInfo, ...] = ()

    def __post_init__(self) -> None:
        if not _DATASET_NAME.fullmatch(self.name):
            raise DataError(
                f"{self.name!r} cannot name a data set: use up to 64 letters, digits, - and _ (see --name)"
            )


@dataclass(frozen=True, slots=True)
class Item:
    """One sample to be: `dataset` is an index into the data sets, `label` -1 where the class is unknown.

    `targets` are those of the manifest (see `framework.data.datasets.DatasetInfo`).
    """

    key: str
    dataset: int
    kind: Kind
    label: int
    class_name: str | None
    source: str
    reader: Reader
    targets: tuple[int, ...] = ()
    target_names: tuple[str, ...] | dict[str, str | None] | None = None
    """The names of the targets, by head if there are heads; None where there is one label."""
    segment: tuple[float, float] | None = None
    about: Mapping[str, Any] | None = None

    @property
    def size(self) -> int:
        """Bytes that it is likely to take in a shard."""
        if self.segment is None:
            return self.reader.size
        return min(self.reader.size, round((self.segment[1] - self.segment[0]) * _BYTES_A_SECOND))


@dataclass(frozen=True, slots=True)
class DatasetPlan:
    """A data set to be written."""

    name: str
    split: str
    kind: Kind
    classes: tuple[str, ...]
    target: TargetKind = "single"
    heads: tuple[HeadInfo, ...] = ()


@dataclass(frozen=True)
class Inventory:
    """All that goes into one set of shards, items sorted by key; and what is known to be left out."""

    datasets: tuple[DatasetPlan, ...]
    items: tuple[Item, ...]
    missing: tuple[str, ...]
    failed: tuple[Failure, ...]


def kind_of_suffix(name: str) -> Kind | None:
    """The media kind that a file name promises; None if it promises none."""
    suffix = os.path.splitext(name)[1].lower().lstrip(".")
    if suffix in VIDEO_SUFFIXES:
        return "video"
    return "image" if suffix in IMAGE_SUFFIXES else None


def inventory(collections: Sequence[Collection]) -> Inventory:
    """Join collections to the items of one set of shards; collections of one name become one data set.

    Raises DataError if two of one name differ in kind, split or heads, if a class is not among those of its
    data set, or if there is nothing to shard.
    """
    datasets = _datasets(collections)
    labels = [
        [{name: label for label, name in enumerate(classes)} for classes in _class_lists(dataset)]
        for dataset in datasets
    ]
    index = {dataset.name: number for number, dataset in enumerate(datasets)}
    items: list[Item] = []
    for collection, stems in zip(collections, _stems(collections), strict=True):
        number = index[collection.name]
        for entry, stem in zip(collection.entries, stems, strict=True):
            items.append(
                Item(
                    key=f"{collection.name}/{stem}",
                    dataset=number,
                    kind=collection.kind,
                    label=-1 if entry.class_name is None else labels[number][0][entry.class_name],
                    class_name=entry.class_name,
                    source=display(entry.source),
                    reader=entry.reader,
                    targets=_targets(entry, datasets[number], labels[number]),
                    target_names=_target_names(entry, datasets[number]),
                    segment=entry.segment,
                    about=entry.about,
                )
            )
    items.sort(key=lambda item: item.key)
    return Inventory(
        datasets=datasets,
        items=tuple(items),
        missing=tuple(name for collection in collections for name in collection.missing),
        failed=tuple(failure for collection in collections for failure in collection.failed),
    )


def _class_lists(dataset: DatasetPlan) -> list[tuple[str, ...]]:
    return [head.classes for head in dataset.heads] or [dataset.classes]


def _targets(entry: Entry, dataset: DatasetPlan, labels: Sequence[dict[str, int]]) -> tuple[int, ...]:
    """The targets of an entry as numbers; DataError where they do not fit the data set."""
    where = f"{display(entry.source)}: in data set {dataset.name!r}"
    if (entry.targets and dataset.target == "single") or (entry.class_name and dataset.target != "single"):
        raise DataError(f"{where} a sample has {dataset.target} targets, this one says otherwise")
    if dataset.target == "heads" and len(entry.targets) != len(dataset.heads):
        heads = ", ".join(head.name for head in dataset.heads)
        raise DataError(f"{where} a sample has a class for each of {heads}, this one {len(entry.targets)}")
    try:
        if dataset.target == "heads":
            pairs = zip(labels, entry.targets, strict=True)
            return tuple(-1 if name is None else known[name] for known, name in pairs)
        return tuple(sorted({labels[0][str(name)] for name in entry.targets}))
    except KeyError as error:
        raise DataError(f"{where} there is no class {error.args[0]!r}") from None


def _target_names(entry: Entry, dataset: DatasetPlan) -> tuple[str, ...] | dict[str, str | None] | None:
    if dataset.target == "single":
        return None
    if dataset.heads:
        return dict(zip((head.name for head in dataset.heads), entry.targets, strict=True))
    return tuple(sorted(str(name) for name in entry.targets))


def _datasets(collections: Sequence[Collection]) -> tuple[DatasetPlan, ...]:
    merged: dict[str, Collection] = {}
    for collection in collections:
        first = merged.setdefault(collection.name, collection)
        if first is collection:
            continue
        if (first.kind, first.split) != (collection.kind, collection.split):
            raise DataError(
                f"two inputs are called {collection.name!r}, but one holds {first.kind}s of split"
                f" {first.split!r} and the other {collection.kind}s of split {collection.split!r}:"
                " give them different names"
            )
        if (first.target, first.heads) != (collection.target, collection.heads):
            raise DataError(f"two inputs are called {first.name!r}, but their samples have other targets")
        merged[collection.name] = replace(
            first, classes=_union(first, collection), entries=[], missing=[], failed=[]
        )
    return tuple(DatasetPlan(c.name, c.split, c.kind, c.classes, c.target, c.heads) for c in merged.values())


def _union(first: Collection, second: Collection) -> tuple[str, ...]:
    if not first.fixed_classes and not second.fixed_classes:
        return tuple(sorted({*first.classes, *second.classes}))
    if first.classes != second.classes:
        raise DataError(f"two inputs are called {first.name!r}, but their lists of classes differ")
    return first.classes


def _stems(collections: Sequence[Collection]) -> list[list[str]]:
    """A unique stem of safe characters for every entry.

    A name that had to be changed, or that two entries share, gets a hash of its full place; so a key depends
    on nothing but names, and is the same in every run.
    """
    cleaned = [[_clean(entry.stem) for entry in collection.entries] for collection in collections]
    uses = Counter(
        (collection.name, stem.lower())
        for collection, stems in zip(collections, cleaned, strict=True)
        for stem, _ in stems
    )
    result: list[list[str]] = []
    for position, collection in enumerate(collections):
        # Inputs that form one data set together may hold the same relative names.
        origin = sum(other.name == collection.name for other in collections[:position])
        result.append(
            [
                f"{stem}-{_short_hash(f'{origin}:{display(entry.source)}')}"
                if changed or uses[collection.name, stem.lower()] > 1
                else stem
                for entry, (stem, changed) in zip(collection.entries, cleaned[position], strict=True)
            ]
        )
    _check_unique(collections, result)
    return result


def _clean(stem: str) -> tuple[str, bool]:
    """Safe characters only, and whether that lost anything; folders are joined by a hyphen."""
    joined = stem.replace("/", "-")
    clean = re.sub(r"[^A-Za-z0-9_-]", "_", joined)[:_STEM_LENGTH]
    return (clean or "_"), clean != joined


def clean_stem(name: str) -> str:
    """The name of a sample as it stands in its key, but for the hash that may come after it."""
    return _clean(display(name))[0]


def _short_hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=5).hexdigest()


def _check_unique(collections: Sequence[Collection], stems: Iterable[list[str]]) -> None:
    keys = Counter(
        (collection.name, stem)
        for collection, names in zip(collections, stems, strict=True)
        for stem in names
    )
    twice = [f"{name}/{stem}" for (name, stem), count in keys.items() if count > 1]
    if twice:
        raise DataError(f"two files would get the same key {twice[0]!r}; rename one of them")
