"""The data sets of a manifest: their classes, and what their samples are labelled with.

A sample has one label, or (`target` multi) any number of classes, or one class for each of several `heads`,
such as verb and noun. The last two lie in a column `targets` of their own, which is there only if a data set
of the folder needs it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy
from numpy.typing import NDArray

from framework.data.urls import Place
from framework.errors import DataError
from framework.targets import TargetKind, TargetSpec

__all__ = [
    "KINDS",
    "DatasetInfo",
    "HeadInfo",
    "Kind",
    "class_names",
    "dataset_entry",
    "datasets_of",
    "rows_of",
    "targets_problem",
]

Kind = Literal["image", "video"]
KINDS: tuple[Kind, Kind] = ("image", "video")
"""The media kinds; their places are the numbers in the column `kind`."""

Integers = NDArray[numpy.int64]


@dataclass(frozen=True)
class HeadInfo:
    """One of several classes that every sample has, such as its verb."""

    name: str
    classes: tuple[str, ...]


@dataclass(frozen=True)
class DatasetInfo:
    """One data set inside the shards.

    A label is an index into `classes`, or -1 where it is not known. Of multi-label samples `targets` lists
    indices into `classes`, ascending, none where no class applies. With `heads`, `classes` is empty, and
    `targets` has an index into each head's classes, -1 where it is not known. Then `label` is -1.
    """

    name: str
    split: str
    kind: Kind
    classes: tuple[str, ...]
    samples: int
    target: TargetKind = "single"
    heads: tuple[HeadInfo, ...] = ()

    def __post_init__(self) -> None:
        if (self.target == "heads") != bool(self.heads) or (self.heads and self.classes):
            raise ValueError(f"data set {self.name!r}: `heads` go with target heads, and without `classes`")
        if len({head.name for head in self.heads}) != len(self.heads):
            raise ValueError(f"data set {self.name!r}: two heads have the same name")

    @property
    def targets(self) -> TargetSpec:
        """Kind and numbers of the classes."""
        if self.heads:
            return TargetSpec.of_heads({head.name: len(head.classes) for head in self.heads})
        return TargetSpec(self.target, (len(self.classes),))

    @property
    def class_lists(self) -> tuple[tuple[str, ...], ...]:
        """The classes of each head; of the data set, if it has no heads."""
        return tuple(head.classes for head in self.heads) or (self.classes,)


def class_names(dataset: DatasetInfo, chosen: Iterable[int]) -> list[str]:
    """The names of a label or of targets; `?` where the class is not known."""
    if dataset.heads:
        pairs = zip(dataset.class_lists, chosen, strict=True)
    else:
        pairs = ((dataset.classes, index) for index in chosen)
    return [classes[index] if 0 <= index < len(classes) else "?" for classes, index in pairs]


def datasets_of(path: Place, entries: Any) -> tuple[DatasetInfo, ...]:
    """The data sets of a manifest; `path` names it in errors.

    Raises DataError where an entry is malformed or two have the same name.
    """
    try:
        datasets = tuple(_parse(entry) for entry in entries)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: a data set entry is malformed ({error!r})") from error
    if len({dataset.name for dataset in datasets}) != len(datasets):
        raise DataError(f"{path}: two data sets have the same name")
    return datasets


def _parse(entry: Any) -> DatasetInfo:
    heads = tuple(
        HeadInfo(str(head["name"]), tuple(str(name) for name in head["classes"]))
        for head in entry.get("heads", ())
    )
    target = entry.get("target", "heads" if heads else "single")
    if target not in ("single", "multi", "heads"):
        raise ValueError(f"target {target!r}")
    return DatasetInfo(
        str(entry["name"]),
        str(entry["split"]),
        KINDS[KINDS.index(entry["kind"])],
        tuple(str(name) for name in entry["classes"]),
        int(entry["samples"]),
        target,
        heads,
    )


def dataset_entry(dataset: DatasetInfo) -> dict[str, Any]:
    """What the manifest says of a data set; nothing of targets where there is one label."""
    entry = asdict(dataset)
    if dataset.target != "multi":
        del entry["target"]
    if not dataset.heads:
        del entry["heads"]
    return entry


def rows_of(
    offsets: NDArray[numpy.integer[Any]], values: NDArray[numpy.int32], rows: Integers
) -> tuple[Integers, NDArray[numpy.int32]]:
    """The targets of some rows: how many each has (rows,), and all of them one after the other."""
    starts, ends = offsets[rows].astype(numpy.int64), offsets[rows + 1].astype(numpy.int64)
    lengths = ends - starts
    before = numpy.cumsum(lengths) - lengths
    places = numpy.repeat(starts - before, lengths) + numpy.arange(int(lengths.sum()))
    return lengths, values[places]


def targets_problem(
    datasets: Sequence[DatasetInfo],
    numbers: Integers,
    offsets: NDArray[numpy.integer[Any]],
    values: NDArray[numpy.int32],
) -> str | None:
    """What is wrong with the targets of a table, if anything; `numbers` (rows,) are the rows' data sets."""
    for number, dataset in enumerate(datasets):
        lengths, chosen = rows_of(offsets, values, numpy.flatnonzero(numbers == number))
        if dataset.target == "single":
            if len(chosen):
                return f"data set {dataset.name!r} has one label for each sample, but targets too"
        elif dataset.target == "heads":
            if (lengths != len(dataset.heads)).any():
                return f"a sample of data set {dataset.name!r} has not one target for each of its heads"
            limits = numpy.array([len(head.classes) for head in dataset.heads])
            table = chosen.reshape(-1, len(limits))
            if ((table < -1) | (table >= limits)).any():
                return f"a target of data set {dataset.name!r} is outside its head's classes"
        else:
            if ((chosen < 0) | (chosen >= len(dataset.classes))).any():
                return f"a target of data set {dataset.name!r} is outside its classes"
            owner = numpy.repeat(numpy.arange(len(lengths)), lengths)
            if ((numpy.diff(chosen) <= 0) & (numpy.diff(owner) == 0)).any():
                return f"the targets of a sample of data set {dataset.name!r} do not ascend"
    return None
