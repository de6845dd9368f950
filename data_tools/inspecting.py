"""What is in a folder of shards: counts, classes, sizes, durations and rates of each data set."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy

from data_tools.report import human_bytes, in_shards
from framework.data.datasets import DatasetInfo, rows_of
from framework.data.manifest import Manifest
from framework.wording import plural

__all__ = ["inspect_shards", "inspection_text"]


def inspect_shards(folder: str | Path) -> dict[str, Any]:
    """A summary of the manifest; bytes, pixels, frames, seconds and frames a second. Raises DataError."""
    manifest = Manifest.open(folder)
    return {
        "folder": str(folder),
        "hash": manifest.hash,
        "samples": len(manifest),
        "shards": len(manifest.shards),
        "bytes": sum(shard.bytes for shard in manifest.shards),
        "datasets": [_dataset(manifest, number, info) for number, info in enumerate(manifest.datasets)],
    }


def _dataset(manifest: Manifest, number: int, info: DatasetInfo) -> dict[str, Any]:
    chosen = manifest.column("dataset") == number
    summary: dict[str, Any] = {
        "name": info.name,
        "split": info.split,
        "kind": info.kind,
        "samples": info.samples,
        **_labels(manifest, chosen, info),
        "sample_bytes": _range(manifest.column("length")[chosen]),
        "width": _range(manifest.column("width")[chosen]),
        "height": _range(manifest.column("height")[chosen]),
    }
    if info.kind == "video":
        frames, fps = manifest.column("frames")[chosen], manifest.column("fps")[chosen]
        seconds = frames / numpy.where(fps > 0, fps, numpy.inf)
        summary["frames"], summary["fps"] = _range(frames), _range(fps)
        summary["seconds"] = {**_range(seconds), "total": round(float(seconds.sum()), 3)}
    return summary


def _labels(manifest: Manifest, chosen: numpy.ndarray, info: DatasetInfo) -> dict[str, Any]:
    """Samples of each class, and how many have none."""
    if info.target == "single":
        labels = manifest.column("label")[chosen]
        return {"unlabelled": int((labels < 0).sum()), "classes": _counts(labels, info.classes)}
    lengths, targets = rows_of(*manifest.targets(), numpy.flatnonzero(chosen))
    if info.target == "multi":
        return {
            "target": "multi",
            "unlabelled": int((lengths == 0).sum()),
            "classes": _counts(targets, info.classes),
            "labels": _range(lengths),
        }
    table = targets.reshape(-1, len(info.heads))
    heads = zip(info.heads, table.T, strict=True)
    return {
        "target": "heads",
        "unlabelled": int((table < 0).any(axis=1).sum()),
        "classes": {},
        "heads": {head.name: _counts(labels, head.classes) for head, labels in heads},
    }


def _counts(labels: numpy.ndarray, classes: Sequence[str]) -> dict[str, int]:
    counts = numpy.bincount(labels[labels >= 0], minlength=len(classes)).tolist()
    return dict(zip(classes, counts, strict=True))


def _range(values: numpy.ndarray) -> dict[str, float]:
    if not len(values):
        return {"min": 0, "median": 0, "max": 0}
    low, middle, high = (round(float(f(values)), 3) for f in (numpy.min, numpy.median, numpy.max))
    return {"min": low, "median": middle, "max": high}


def inspection_text(summary: dict[str, Any]) -> str:
    """The summary as a table for people."""
    lines = [
        f"{summary['folder']}: {in_shards(summary['samples'], summary['shards'])},"
        f" {human_bytes(summary['bytes'])}, manifest {summary['hash']}"
    ]
    for dataset in summary["datasets"]:
        lines.append(f"\n{dataset['name']}")
        lines.extend(f"  {name:<11}{text}" for name, text in _rows(dataset))
    return "\n".join(lines)


def _rows(dataset: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "samples", f"{dataset['samples']} {dataset['kind']}s, split {dataset['split']}"
    if dataset["classes"]:
        yield "classes", _classes_text(dataset["classes"])
    for head, counted_classes in dataset.get("heads", {}).items():
        yield head[:10], _classes_text(counted_classes)
    if "labels" in dataset:
        yield "labels", _spread(dataset["labels"], "{:g}".format) + " of a sample"
    if dataset["unlabelled"]:
        yield "unlabelled", str(dataset["unlabelled"])
    yield "file size", _spread(dataset["sample_bytes"], human_bytes)
    yield "width", _spread(dataset["width"], "{:g} px".format)
    yield "height", _spread(dataset["height"], "{:g} px".format)
    if "frames" in dataset:
        yield "frames", _spread(dataset["frames"], "{:g}".format)
        yield "rate", _spread(dataset["fps"], "{:g} frames/s".format)
        yield "seconds", _spread(dataset["seconds"], "{:g}".format)
        yield "in all", f"{dataset['seconds']['total'] / 3600:.2f} hours"


def _classes_text(classes: Mapping[str, int]) -> str:
    empty = [name for name, count in classes.items() if not count]
    without = f"; none of {', '.join(empty[:5])}{' …' if len(empty) > 5 else ''}" if empty else ""
    each = _spread(_range(numpy.array([float(count) for count in classes.values()])), "{:g}".format)
    return f"{len(classes)} with {each} {plural('sample', max(classes.values()))} each{without}"


def _spread(values: Mapping[str, float], form: Callable[[float], str]) -> str:
    if values["min"] == values["max"]:
        return form(values["min"])
    return f"{form(values['min'])} to {form(values['max'])} (median {form(values['median'])})"
