"""What is in a folder of shards: counts, classes, sizes, durations and rates of each data set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy

from data_tools.report import human_bytes
from framework.data.manifest import DatasetInfo, Manifest

__all__ = ["inspect_shards", "inspection_text"]


def inspect_shards(folder: Path) -> dict[str, Any]:
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
    labels = manifest.column("label")[chosen]
    counts = numpy.bincount(labels[labels >= 0], minlength=len(info.classes)).tolist()
    summary: dict[str, Any] = {
        "name": info.name,
        "split": info.split,
        "kind": info.kind,
        "samples": info.samples,
        "unlabelled": int((labels < 0).sum()),
        "classes": dict(zip(info.classes, counts, strict=True)),
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


def _range(values: numpy.ndarray) -> dict[str, float]:
    if not len(values):
        return {"min": 0, "median": 0, "max": 0}
    low, middle, high = (round(float(f(values)), 3) for f in (numpy.min, numpy.median, numpy.max))
    return {"min": low, "median": middle, "max": high}


def inspection_text(summary: dict[str, Any]) -> str:
    """The summary as a table for people."""
    lines = [
        f"{summary['folder']}: {summary['samples']} samples in {summary['shards']} shards,"
        f" {human_bytes(summary['bytes'])}, manifest {summary['hash']}"
    ]
    for dataset in summary["datasets"]:
        classes = dataset["classes"]
        rows = [("samples", f"{dataset['samples']} {dataset['kind']}s, split {dataset['split']}")]
        if classes:
            spread = f"{min(classes.values())} to {max(classes.values())} samples each"
            empty = [name for name, count in classes.items() if not count]
            without = f"; none of {', '.join(empty[:5])}{' …' if len(empty) > 5 else ''}" if empty else ""
            rows.append(("classes", f"{len(classes)}, {spread}{without}"))
        if dataset["unlabelled"]:
            rows.append(("unlabelled", str(dataset["unlabelled"])))
        size = {name: human_bytes(value) for name, value in dataset["sample_bytes"].items()}
        rows.append(("file size", f"{size['min']} to {size['max']}, median {size['median']}"))
        units = {"width": "px", "height": "px", "frames": "", "fps": "frames a second", "seconds": "s"}
        for name, unit in units.items():
            if name in dataset:
                values = dataset[name]
                rows.append(
                    (
                        name,
                        f"{values['min']:g} to {values['max']:g} {unit}, median {values['median']:g}".replace(
                            " ,", ","
                        ),
                    )
                )
        if "seconds" in dataset:
            rows.append(("duration", f"{dataset['seconds']['total'] / 3600:.2f} hours in all"))
        lines.append(f"\n{dataset['name']}")
        lines.extend(f"  {name:<11}{text}" for name, text in rows)
    return "\n".join(lines)
