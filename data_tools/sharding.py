"""Sharding: an inventory becomes a folder of shards with a manifest, whole or not at all.

Items are permuted by a hash of (seed, key) and cut into shards before any work is done; so shards do not
depend on the number of workers, and the same input gives the same bytes. All work happens in `OUT.partial`;
one rename at the end gives the folder its name. A killed run is continued by the same command.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_tools.items import Inventory, Item
from data_tools.pool import progress_bar, run_tasks
from data_tools.report import REPORT_NAME, ShardReport
from data_tools.shard_writer import ROW, ShardRecord, ShardTask, make_shard, read_record, shard_name
from framework.data.manifest import MANIFEST_NAME, SAMPLES_NAME, TARGETS, DatasetInfo, ShardInfo
from framework.data.manifest_writer import write_manifest
from framework.errors import DataError
from framework.files import replace_text, sync_folder

__all__ = ["ShardOptions", "shard"]

_LAYOUT = 1
"""Part of the settings of a run: raised when the same items would give other bytes."""

_OURS = re.compile(r"(shard-\d+\.(tar|done)|settings|manifest\.json|samples\.arrow|report\.json)(\.tmp)?")
"""Files that may lie in a staging folder."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShardOptions:
    """Where shards go and how they are cut: a shard ends at so many samples or bytes of source files."""

    out: Path
    workers: int = 1
    seed: int = 0
    samples: int = 4096
    megabytes: int = 256
    overwrite: bool = False

    def __post_init__(self) -> None:
        for name in ("workers", "samples", "megabytes"):
            if getattr(self, name) < 1:
                raise DataError(f"{name} must be at least 1, not {getattr(self, name)}")


def shard(inventory: Inventory, options: ShardOptions) -> ShardReport:
    """Write the shards and return what was written, missing and left out.

    Raises DataError if `out` is taken or cannot be written; what was finished before a disk ran full stays in
    `OUT.partial` and is used by the next run. Where no item at all is usable, nothing is written.
    """
    out = Path(os.path.abspath(options.out))
    _check_free(out, options.overwrite)
    staging = out.with_name(out.name + ".partial")
    try:
        with _locked(staging):
            return _shard_in(staging, out, inventory, options)
    except OSError as error:
        raise DataError(
            f"{error.filename or staging}: cannot write the shards ({error.strerror}); finished shards are"
            f" kept in {staging}: make room or set the permissions, and run the same command again"
        ) from error


def _shard_in(staging: Path, out: Path, inventory: Inventory, options: ShardOptions) -> ShardReport:
    cut = _cut(inventory.items, options)
    settings = _settings(inventory, options)
    _prepare(staging, settings)
    names = tuple(dataset.name for dataset in inventory.datasets)
    records: dict[int, ShardRecord] = {}
    tasks: list[ShardTask] = []
    for number, items in enumerate(cut):
        if record := read_record(staging, number, settings):
            records[number] = record
        else:
            tasks.append(ShardTask(number, staging, settings, names, items))
    if records:
        _logger.info("continuing in %s: %d of %d shards are there already", staging, len(records), len(cut))
    with progress_bar("sharding", sum(len(task.items) for task in tasks)) as progress:
        for record in run_tasks(make_shard, tasks, options.workers, progress):
            records[record.number] = record
    ordered = [records[number] for number in range(len(cut))]
    report = _report(out, inventory, ordered)
    if not report.written:
        shutil.rmtree(staging)
        return report
    _finish(staging, out, inventory, ordered, report, options.overwrite)
    return report


def _cut(items: Sequence[Item], options: ShardOptions) -> list[tuple[Item, ...]]:
    """Items in their random order, cut where a shard is full."""
    seed = options.seed.to_bytes(8, "little", signed=True)

    def place(item: Item) -> bytes:
        return hashlib.blake2b(item.key.encode(), key=seed, digest_size=16).digest()

    size = sum(item.reader.size for item in items)
    count = max(1, math.ceil(len(items) / options.samples), math.ceil(size / (options.megabytes * 2**20)))
    length = math.ceil(len(items) / count)  # shards of equal length keep all workers busy to the end
    shards: list[tuple[Item, ...]] = []
    current: list[Item] = []
    size = 0
    for item in sorted(items, key=place):
        full = len(current) >= length or size + item.reader.size > options.megabytes * 2**20
        if current and full:
            shards.append(tuple(current))
            current, size = [], 0
        current.append(item)
        size += item.reader.size
    if current:
        shards.append(tuple(current))
    return shards


def _settings(inventory: Inventory, options: ShardOptions) -> str:
    """A digest of all that decides the bytes: unfinished work is continued only if it is the same."""
    digest = hashlib.blake2b(digest_size=16)
    head = [_LAYOUT, options.seed, options.samples, options.megabytes]
    digest.update(json.dumps([head, [asdict(dataset) for dataset in inventory.datasets]]).encode())
    for item in inventory.items:
        line = [item.key, item.dataset, item.label, item.source, item.reader.identity, item.targets]
        digest.update(json.dumps(line).encode())
    return digest.hexdigest()


def _check_free(out: Path, overwrite: bool) -> None:
    """Nothing that a person might need is ever written over."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not overwrite:
        raise DataError(f"{out}: exists already; choose another --out, or replace it with --overwrite")
    if not (out / MANIFEST_NAME).is_file():
        raise DataError(
            f"{out}: --overwrite replaces only a folder of shards, and this is none ({MANIFEST_NAME})"
        )


@contextmanager
def _locked(staging: Path) -> Iterator[None]:
    """Only one process at a time works on a set of shards; the lock ends with the process that holds it.

    A file system without locks (Lustre mounted without `flock`, for one) goes without, and that is said.
    """
    staging.mkdir(parents=True, exist_ok=True)
    folder = os.open(staging, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if isinstance(error, BlockingIOError):
                raise
            _logger.warning(
                "%s: cannot be locked (%s): start no second command on it", staging, error.strerror
            )
        # It may have got its final name between the two lines above.
        if not staging.exists() or not os.path.samestat(os.fstat(folder), staging.stat()):
            raise BlockingIOError
        yield
    except BlockingIOError:
        raise DataError(f"{staging}: another process is making these shards; wait for it or end it") from None
    finally:
        os.close(folder)


def _prepare(staging: Path, settings: str) -> None:
    """A staging folder for exactly these settings; one of other settings is emptied, and that is said."""
    note = staging / "settings"
    present = list(staging.iterdir())
    if foreign := [path.name for path in present if not _OURS.fullmatch(path.name)]:
        raise DataError(
            f"{staging}: shards are made in this folder, but it holds other files ({', '.join(foreign[:5])}):"
            " move them away, or choose another --out"
        )
    leftover = [path for path in present if path.suffix == ".tmp"]
    if present and not (note.is_file() and note.read_text() == settings):
        _logger.warning("%s is from other settings or other files: starting anew", staging)
        leftover = present
    for path in leftover:
        path.unlink()
    replace_text(note, settings)


def _finish(
    staging: Path, out: Path, inventory: Inventory, records: Sequence[ShardRecord], report: ShardReport,
    overwrite: bool,
) -> None:  # fmt: skip
    """Number the shards without gaps, write manifest and report, and give the folder its name."""
    # From here on the records no longer describe the files: a run killed now starts anew.
    (staging / "settings").unlink()
    for leftover in staging.glob("*.done"):
        leftover.unlink()
    kept = [record for record in records if record.rows]
    for number, record in enumerate(kept):
        if number != record.number:
            (staging / shard_name(record.number)).rename(staging / shard_name(number))
    shards = [
        ShardInfo(shard_name(number), record.bytes, record.blake2b, len(record.rows))
        for number, record in enumerate(kept)
    ]
    columns = _columns(kept, inventory)
    counts = [0] * len(inventory.datasets)
    for dataset in columns["dataset"]:
        counts[dataset] += 1
    datasets = [
        DatasetInfo(plan.name, plan.split, plan.kind, plan.classes, count, plan.target, plan.heads)
        for plan, count in zip(inventory.datasets, counts, strict=True)
    ]
    replace_text(staging / REPORT_NAME, report.to_json())
    write_manifest(staging, columns, shards, datasets)
    old = out.with_name(out.name + ".old")
    if overwrite and out.exists():
        out.rename(old)
    staging.rename(out)
    sync_folder(out.parent)
    if overwrite and old.exists():
        _remove(old)


def _columns(records: Sequence[ShardRecord], inventory: Inventory) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {name: [] for name in ("shard", *ROW)}
    for number, record in enumerate(records):
        columns["shard"].extend([number] * len(record.rows))
        for name, values in zip(ROW, zip(*record.rows, strict=True), strict=True):
            columns[name].extend(values)
    if all(dataset.target == "single" for dataset in inventory.datasets):
        del columns[TARGETS.name]
    return columns


def _remove(old: Path) -> None:
    """Remove a replaced folder file by file: only what shards are made of."""
    for path in (*old.glob("shard-*.tar"), old / SAMPLES_NAME, old / MANIFEST_NAME, old / REPORT_NAME):
        path.unlink(missing_ok=True)
    if any(old.iterdir()):
        _logger.warning("%s: kept, because it holds files that are no shards", old)
    else:
        old.rmdir()


def _report(out: Path, inventory: Inventory, records: Sequence[ShardRecord]) -> ShardReport:
    failed = [*inventory.failed, *(failure for record in records for failure in record.failed)]
    return ShardReport(
        out=str(out),
        written=sum(len(record.rows) for record in records),
        missing=tuple(inventory.missing),
        failed=tuple(sorted(failed, key=lambda failure: failure.key)),
        shards=sum(bool(record.rows) for record in records),
        bytes=sum(record.bytes for record in records),
    )
