"""Writing a manifest: the table of samples first, manifest.json last, each by tmp + fsync + rename."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy
import pyarrow

from framework.data.datasets import KINDS, DatasetInfo, dataset_entry, targets_problem
from framework.data.manifest import (
    MANIFEST_NAME,
    SAMPLES_NAME,
    SCHEMA,
    TARGETS,
    ShardInfo,
    version_of,
)
from framework.data.manifest_file import FORMAT, manifest_text
from framework.data.table import block_entry
from framework.errors import DataError
from framework.files import hash_file, replace_file, replace_text

__all__ = ["write_manifest"]


def write_manifest(
    folder: str | Path,
    samples: Mapping[str, Any],
    shards: Sequence[ShardInfo],
    datasets: Sequence[DatasetInfo],
) -> None:
    """Write samples.arrow and then manifest.json beside shards that are there already.

    `samples` maps each column of `SCHEMA` to a sequence or array; rows are ordered by (shard, offset). Where
    a data set is multi-label or has heads, a column `targets` comes on top, whose lists are empty in rows
    of other data sets. Equal arguments give equal bytes. Raises DataError if the columns contradict the
    shards or the data sets.
    """
    folder = Path(folder)
    version = version_of(datasets)
    batch = _record_batch(samples, SCHEMA if version == 1 else SCHEMA.append(TARGETS))
    _check(folder, batch, shards, datasets)
    # An old manifest must not vouch for the new table, should we be killed between the two files.
    (folder / MANIFEST_NAME).unlink(missing_ok=True)
    replace_file(folder / SAMPLES_NAME, lambda file: _write_batch(file, batch))
    path = folder / SAMPLES_NAME
    content = {
        "format": FORMAT,
        "version": version,
        "samples": {
            "file": SAMPLES_NAME,
            "bytes": path.stat().st_size,
            "blake2b": hash_file(path),
            "count": len(batch),
            "blocks": block_entry(batch, len(shards), [dataset.name for dataset in datasets]),
        },
        "shards": [asdict(shard) for shard in shards],
        "datasets": [dataset_entry(dataset) for dataset in datasets],
    }
    replace_text(folder / MANIFEST_NAME, manifest_text(content))


def _record_batch(samples: Mapping[str, Any], schema: pyarrow.Schema) -> pyarrow.RecordBatch:
    if set(samples) != set(schema.names):
        difference = sorted(set(samples) ^ set(schema.names))
        raise DataError(f"the columns of this manifest are {', '.join(schema.names)}; wrong: {difference}")
    arrays = [pyarrow.array(samples[field.name], type=field.type) for field in schema]
    return pyarrow.RecordBatch.from_arrays(arrays, schema=schema)


def _write_batch(file: BinaryIO, batch: pyarrow.RecordBatch) -> None:
    with pyarrow.ipc.new_file(file, batch.schema) as writer:
        writer.write_batch(batch)


def _check(
    folder: Path, batch: pyarrow.RecordBatch, shards: Sequence[ShardInfo], datasets: Sequence[DatasetInfo]
) -> None:
    """The table, the shards and the data sets must tell the same story."""
    columns = {
        name: batch.column(name).to_numpy().astype(numpy.int64)
        for name in ("shard", "offset", "length", "dataset", "kind", "label")
    }
    shard, dataset = columns["shard"], columns["dataset"]
    per_shard = numpy.bincount(shard, minlength=len(shards))
    per_dataset = numpy.bincount(dataset, minlength=len(datasets))
    problem = None
    if per_shard.tolist() != [entry.samples for entry in shards]:
        problem = "the rows do not match the shards' sample counts"
    elif per_dataset.tolist() != [entry.samples for entry in datasets]:
        problem = "the rows do not match the data sets' sample counts"
    elif len({entry.name for entry in datasets}) != len(datasets):
        problem = "two data sets have the same name"
    elif len(batch) and not _ordered(shard, columns["offset"]):
        problem = "the rows are not ordered by (shard, offset)"
    elif len(batch):
        sizes = numpy.array([entry.bytes for entry in shards], dtype=numpy.int64)
        single = [len(entry.classes) if entry.target == "single" else 0 for entry in datasets]
        classes = numpy.array(single, dtype=numpy.int64)
        kinds = numpy.array([KINDS.index(entry.kind) for entry in datasets], dtype=numpy.int64)
        if (columns["offset"] + columns["length"] > sizes[shard]).any():
            problem = "a sample lies outside its shard"
        elif ((columns["label"] < -1) | (columns["label"] >= classes[dataset])).any():
            problem = "a label is outside its data set's classes"
        elif (columns["kind"] != kinds[dataset]).any():
            problem = "a sample's kind is not that of its data set"
    if problem is None and TARGETS.name in batch.schema.names:
        targets = cast(pyarrow.LargeListArray, batch.column(TARGETS.name))
        values = targets.offsets.to_numpy(), targets.values.to_numpy()
        problem = targets_problem(datasets, dataset, *values)
    if problem:
        raise DataError(f"{folder}: cannot write the manifest: {problem}")


def _ordered(shard: numpy.ndarray, offset: numpy.ndarray) -> bool:
    same = shard[1:] == shard[:-1]
    return bool(((shard[1:] > shard[:-1]) | (same & (offset[1:] > offset[:-1]))).all())
