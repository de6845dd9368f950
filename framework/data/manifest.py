"""The manifest of a folder of shards: what lies where, and what it is.

A folder of shards holds tar files, `samples.arrow` (one row per sample, memory-mapped) and `manifest.json`
(versions, sizes, checksums, data sets), which is written last: a folder without it is unfinished. The
manifest makes a tar randomly accessible and lets corruption be found that decoders accept in silence.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy
import pyarrow

from framework.data.datasets import KINDS, DatasetInfo, HeadInfo, Kind, datasets_of
from framework.data.folder_files import check_sizes, read_local
from framework.data.manifest_file import FORMAT, VERSION, ManifestFile, parse_manifest
from framework.data.remote import RemoteFolder
from framework.data.table import BlockSums, Selection, Summary, read_summaries
from framework.data.urls import Address, Place, place_of
from framework.errors import DataError
from framework.files import hash_file
from framework.recipe.cache_section import Cache
from framework.wording import counted

__all__ = [
    "FORMAT",
    "KINDS",
    "MANIFEST_NAME",
    "SAMPLES_NAME",
    "SCHEMA",
    "TARGETS",
    "VERSION",
    "DatasetInfo",
    "HeadInfo",
    "Kind",
    "Manifest",
    "SampleInfo",
    "ShardInfo",
    "version_of",
]

MANIFEST_NAME = "manifest.json"
SAMPLES_NAME = "samples.arrow"
EAGER_BYTES = 1 << 26
"""Tables up to this size are checked as a whole when a source opens; larger ones where they are touched."""

SCHEMA = pyarrow.schema(
    [
        ("key", pyarrow.large_string()),
        ("shard", pyarrow.uint32()),
        ("offset", pyarrow.uint64()),
        ("length", pyarrow.uint64()),
        ("crc32", pyarrow.uint32()),
        ("dataset", pyarrow.uint16()),
        ("kind", pyarrow.uint8()),
        ("label", pyarrow.int32()),
        ("width", pyarrow.uint32()),
        ("height", pyarrow.uint32()),
        ("frames", pyarrow.uint32()),
        ("fps", pyarrow.float32()),
        ("keyframes", pyarrow.large_list(pyarrow.uint32())),
        ("extension", pyarrow.large_string()),
    ]
)
"""Columns of samples.arrow. `offset` and `length` are those of the media bytes inside the tar."""

TARGETS = pyarrow.field("targets", pyarrow.large_list(pyarrow.int32()))
"""One more column in version 2: classes beyond one label (see `DatasetInfo`)."""


@dataclass(frozen=True)
class ShardInfo:
    """One tar file: its name in the folder, size in bytes, blake2b (16 bytes, hex) and number of samples."""

    name: str
    bytes: int
    blake2b: str
    samples: int


@dataclass(frozen=True)
class SampleInfo:
    """One sample. `frames` really decode; `fps` is 0 for images; `keyframes` are frame indices."""

    index: int
    key: str
    shard: str
    offset: int
    length: int
    crc32: int
    dataset: str
    kind: Kind
    label: int
    width: int
    height: int
    frames: int
    fps: float
    keyframes: numpy.ndarray
    extension: str
    targets: tuple[int, ...] = ()
    """Where the data set is multi-label or has heads (see `DatasetInfo`)."""


def version_of(datasets: Sequence[DatasetInfo]) -> int:
    """The version of a manifest of these data sets: the oldest that can say what they are."""
    return 1 if all(dataset.target == "single" for dataset in datasets) else 2


@dataclass(frozen=True)
class SampleTable:
    """samples.arrow, mapped: its file on this machine, its rows, and what the manifest says of them."""

    path: Path
    batch: pyarrow.RecordBatch
    checksum: str
    blocks: Mapping[str, Any] | None
    """Checksums and counts of blocks of rows (`framework.data.table`); None in those of earlier versions."""


class Manifest:
    """A folder of shards, opened for reading. Samples are ordered by (shard, offset).

    `folder` is its path or its address; `table` the file on this machine that holds its samples.arrow, and
    `remote` fetches its files if it is in a store.
    """

    def __init__(
        self,
        folder: Place,
        file: ManifestFile,
        shards: tuple[ShardInfo, ...],
        datasets: tuple[DatasetInfo, ...],
        samples: SampleTable,
        remote: RemoteFolder | None = None,
    ) -> None:
        batch, blocks = samples.batch, samples.blocks
        self.folder = folder
        self.table = samples.path
        self.remote = remote
        self.hash = file.hash
        self.has_checksum = file.has_checksum
        """Of manifest.json itself; earlier versions wrote none."""
        self.shards = shards
        self.datasets = datasets
        self.samples_checksum = samples.checksum
        """blake2b that samples.arrow should have; compared by `check_table`."""
        self._batch = batch
        self._fields = {name: batch.column(name) for name in batch.schema.names}  # making one takes 10 us
        self._columns: dict[str, numpy.ndarray] = {}
        self._sums = BlockSums(batch, blocks) if blocks else None
        self.summaries: dict[str, Summary] = read_summaries(blocks, len(shards), len(batch)) if blocks else {}
        """Of each data set that has samples; none in manifests of earlier versions."""

    @classmethod
    def open(cls, folder: str | Place, cache: Cache | None = None) -> Manifest:
        """Read and check the manifest of a path or an address: itself, and presence and sizes of all files.

        Of a store the table is fetched, into the folder that `cache` names. Checksums of local files are not
        computed here, so that opening stays cheap: see `check_table`, and `tubeworks data verify`.
        Raises DataError that names the folder, what is wrong with it, and what to do.
        """
        folder = place_of(folder)
        remote = RemoteFolder(folder.url, cache) if isinstance(folder, Address) else None
        raw = remote.read(MANIFEST_NAME) if remote else read_local(Path(str(folder)), MANIFEST_NAME)
        file = parse_manifest(folder / MANIFEST_NAME, raw)
        shards = _shards_of(file)
        datasets = datasets_of(file.path, file.field("datasets"))
        if remote:
            remote.add([(shard.name, shard.bytes, shard.blake2b) for shard in shards])
        check_sizes(folder, {shard.name: shard.bytes for shard in shards}, remote)
        samples = _open_samples(folder, file, remote)
        count, expected = len(samples.batch), sum(shard.samples for shard in shards)
        if not count == expected == sum(dataset.samples for dataset in datasets):
            raise DataError(
                f"{folder}: {SAMPLES_NAME} lists {counted(count, 'sample')}, the shards of "
                f"{MANIFEST_NAME} hold {expected}: the files do not belong together; copy the folder again "
                "or shard anew"
            )
        try:
            return cls(folder, file, shards, datasets, samples, remote)
        except (KeyError, TypeError, ValueError, zlib.error) as error:
            raise DataError(
                f"{folder / MANIFEST_NAME}: the entry `blocks` is malformed ({error!r}); copy the folder "
                "again"
            ) from error

    def check_table(self) -> None:
        """Compare samples.arrow, which holds the labels, with its checksum (about 1 s per GB).

        A large table that has checksums of its blocks is left alone here: `sample` checks each block when it
        first reads from it. Raises DataError where the table was changed: the checksums of single samples do
        not cover their labels.
        """
        path = self.table
        try:
            if self._sums is not None and path.stat().st_size > EAGER_BYTES:
                return
            intact = hash_file(path) == self.samples_checksum
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}); check the permissions") from error
        if not intact:
            raise self._changed("its checksum")

    def _changed(self, what: str) -> DataError:
        return DataError(
            f"{self.folder / SAMPLES_NAME}: {what} is not that of {MANIFEST_NAME}: labels or places of "
            "samples were changed or damaged after it was written; copy the folder again or shard anew"
        )

    def __len__(self) -> int:
        return len(self._batch)

    def __reduce__(self) -> tuple[Any, ...]:
        """Open again in the other process: a memory map does not travel."""
        return (Manifest.open, (self.folder, self.remote.settings if self.remote else None))

    def shard_path(self, name: str) -> Path:
        """A file on this machine with the bytes of a shard; from a store it is fetched. Raises DataError."""
        return self.remote.path(name) if self.remote else Path(str(self.folder)) / name

    def column(self, name: str) -> numpy.ndarray:
        """One column as a read-only array (samples,): numbers as a view of the file, text as objects."""
        if name not in self._columns:
            if name not in SCHEMA.names or name == "keyframes":
                raise KeyError(f"{name!r} is not a flat column of the manifest")
            column = self._batch.column(name)
            array = column.to_numpy(zero_copy_only=not pyarrow.types.is_large_string(column.type))
            array.flags.writeable = False
            self._columns[name] = array
        return self._columns[name]

    def sample(self, index: int) -> SampleInfo:
        """All that is known of the sample at `index` (0 … len - 1)."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)} in {self.folder}")
        self._check_block(index)
        row = {name: self._fields[name][index].as_py() for name in SCHEMA.names if name != "keyframes"}
        try:
            row["shard"] = self.shards[row["shard"]].name
            row["dataset"] = self.datasets[row["dataset"]].name
            row["kind"] = KINDS[row["kind"]]
        except IndexError:
            raise DataError(
                f"{self.folder / SAMPLES_NAME}: sample {index} points outside the manifest;"
                " run `tubeworks data verify` on the folder, and copy or shard it anew"
            ) from None
        return SampleInfo(index=index, keyframes=self.keyframes(index), targets=self._targets(index), **row)

    def _check_block(self, row: int) -> None:
        """Raise DataError where the rows around this one were changed; a look at what is known otherwise."""
        if self._sums is not None and not self._sums.intact(row):
            first = row // self._sums.rows * self._sums.rows
            raise self._changed(f"the checksum of the rows from {first} on")

    def keyframes(self, index: int) -> numpy.ndarray:
        """Indices of the key frames of the sample at `index`, read-only uint32; empty for images."""
        column = cast(pyarrow.LargeListArray, self._fields["keyframes"])
        return column[index].values.to_numpy(zero_copy_only=True)

    def targets(self) -> tuple[numpy.ndarray, numpy.ndarray]:
        """All targets, int32, one sample's after the other's, and where each begins (samples + 1,).

        Empty where every data set has one label for a sample (see `framework.data.datasets.rows_of`).
        """
        if TARGETS.name not in self._fields:
            return numpy.zeros(len(self) + 1, numpy.int64), numpy.empty(0, numpy.int32)
        column = cast(pyarrow.LargeListArray, self._fields[TARGETS.name])
        return column.offsets.to_numpy(), column.values.to_numpy()

    def _targets(self, index: int) -> tuple[int, ...]:
        if TARGETS.name not in self._fields:
            return ()
        return tuple(self._fields[TARGETS.name][index].as_py())

    def dataset(self, name: str) -> DatasetInfo:
        """The data set called `name`; DataError that lists what there is if it is not here."""
        for dataset in self.datasets:
            if dataset.name == name:
                return dataset
        raise DataError(f"{self.folder}: no data set {name!r} in these shards; there is {self._listing()}")

    def find(self, dataset: str | None, default: str, kind: Kind) -> DatasetInfo:
        """The data set for a source: the named one, else the one of its name, else the only one of `kind`.

        Raises DataError, listing what there is, if that is none, several, or of the other kind.
        """
        if dataset is not None:
            found = self.dataset(dataset)
        else:
            named = [candidate for candidate in self.datasets if candidate.name == default]
            candidates = named or [candidate for candidate in self.datasets if candidate.kind == kind]
            if len(candidates) != 1:
                raise DataError(
                    f"{self.folder}: source {default!r} needs one {kind} data set, and there is"
                    f" {self._listing()}; say which with `dataset:`"
                )
            found = candidates[0]
        if found.kind != kind:
            raise DataError(
                f"{self.folder}: data set {found.name!r} holds {found.kind}s, but source {default!r} asks for"
                f" {kind}s; there is {self._listing()}"
            )
        return found

    def select(self, dataset: str | None, default: str, kind: Kind) -> numpy.ndarray:
        """Indices (int64, ascending) of the samples of the data set that `find` returns."""
        number = self.datasets.index(self.find(dataset, default, kind))
        return numpy.flatnonzero(self.column("dataset") == number).astype(numpy.int64, copy=False)

    def selection(self, dataset: str | None, default: str, kind: Kind) -> Selection | numpy.ndarray:
        """Like `select`, without holding all indices in memory where the manifest knows its blocks."""
        found = self.find(dataset, default, kind)
        summary = self.summaries.get(found.name)
        if summary is None or self._sums is None:
            return self.select(dataset, default, kind)
        column, number = self.column("dataset"), self.datasets.index(found)
        return Selection(column, number, summary, self._sums.rows, self._check_block)

    def _listing(self) -> str:
        listed = (f"{one.name} ({one.kind}, {counted(one.samples, 'sample')})" for one in self.datasets)
        return ", ".join(listed) or "nothing"


def _shards_of(file: ManifestFile) -> tuple[ShardInfo, ...]:
    try:
        shards = tuple(
            ShardInfo(str(s["name"]), int(s["bytes"]), str(s["blake2b"]), int(s["samples"]))
            for s in file.field("shards")
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{file.path}: a shard entry is malformed ({error!r})") from error
    for shard in shards:
        # A foreign manifest must not make us read outside its folder.
        if os.path.basename(shard.name) != shard.name or shard.name in ("", ".", ".."):
            raise DataError(f"{file.path}: {shard.name!r} is not the name of a file beside it")
    return shards


def _open_samples(folder: Place, file: ManifestFile, remote: RemoteFolder | None) -> SampleTable:
    """Memory-map samples.arrow after checking size and columns."""
    entry, version = file.field("samples"), file.content["version"]
    advice = "copy the folder again or shard anew"
    try:
        size, count, name = int(entry["bytes"]), int(entry["count"]), entry["file"]
        digest = str(entry["blake2b"])
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{folder / MANIFEST_NAME}: the entry `samples` is malformed ({error!r})") from error
    if name != SAMPLES_NAME:
        raise DataError(f"{folder / MANIFEST_NAME}: samples must be in {SAMPLES_NAME}, not in {name!r}")
    path = remote.table(SAMPLES_NAME, size, digest) if remote else Path(str(folder)) / SAMPLES_NAME
    try:
        actual = path.stat().st_size
        if actual != size:
            raise DataError(f"{path}: {actual} bytes instead of {size}: {advice}")
        reader = pyarrow.ipc.open_file(pyarrow.memory_map(str(path)))
        schema = SCHEMA if version == 1 else SCHEMA.append(TARGETS)
        if reader.schema != schema or reader.num_record_batches != 1:
            raise DataError(
                f"{path}: not the table that version {version} of the manifest describes; {advice}"
            )
        batch = reader.get_batch(0)
        batch.validate()  # that what its columns claim to hold lies inside the file
    except FileNotFoundError:
        raise DataError(f"{path}: missing; {advice}") from None
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path}: cannot be read ({error}); {advice}") from error
    if len(batch) != count:
        raise DataError(f"{path}: {counted(len(batch), 'sample')} instead of {count}; {advice}")
    return SampleTable(path, batch, digest, entry.get("blocks"))
